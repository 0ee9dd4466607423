"""Frozen bases that are held in parts, one in each process, by FSDP2; adapters and all that trains stay whole in each.

A transformer layer is gathered when it is needed and let go afterwards. Nothing that trains is FSDP's, so parameters
may be replaced while the model trains, and gradients take the one way that they take without it.
"""

from typing import Any

import torch
from torch import nn

from dora_cli.adapters.base import AdapterLayer, is_packed
from dora_cli.errors import UserError
from dora_cli.models.targets import blocks
from dora_cli.processes import World, mesh

LARGE = 0.5  # of a device's memory: a base that takes more is sharded by train.shard=auto


def is_sharded(shard: str, model: nn.Module, world: World, device: torch.device, *, packed: bool = False) -> bool:
    """What ``train.shard`` comes to for this model, whose weights are in the type that they will be held in.

    Args:
        packed: whether the weights of a model without numbers would be packed.

    Raises:
        UserError: ``full`` is asked for, and nothing is frozen, or the weights are packed.
    """
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    if world.alone or shard == "none":
        return False
    if packed or any(is_packed(module) for module in model.modules()):
        if shard == "full":
            raise UserError(
                "train.shard=full splits the frozen base, and packed (quantised) weights can't be split",
                hint="set train.shard=none: each process then holds all of them; or model.quantization=null",
            )
        return False
    if shard == "full":
        if frozen == 0:
            raise UserError(
                "train.shard=full splits the frozen base, and this method trains all of it",
                hint="set train.shard=none, or choose a low-rank method",
            )
        return True
    return device.type == "cuda" and frozen > LARGE * torch.cuda.get_device_properties(device).total_memory


def refuse_layer_drop(model: Any) -> None:
    """Processes that skip different layers can neither gather the same ones nor add up the same gradients of modules.

    Raises:
        UserError: the model skips layers at random in training.
    """
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    if found := [name for name in names if getattr(model.config, name, 0)]:
        raise UserError(
            f"{type(model).__name__} skips layers at random ({found[0]}), others in each process",
            hint=f"set {found[0]} to 0 in its config.json, or train in one process",
        )


def shard(model: Any, device: torch.device) -> None:
    """Split what is frozen over all processes, layer by layer; each goes to the device, and its whole goes again.

    Args:
        model: with its adapters in place, on the CPU. What trains, and all of an adapter, stays whole.
    """
    from torch.distributed.fsdp import fully_shard

    whole = {p for p in model.parameters() if p.requires_grad}
    whole |= {p for m in model.modules() if isinstance(m, AdapterLayer) for p in m.adapter_parameters().values()}
    ways = mesh(device.type)
    for block in blocks(model):
        fully_shard(block, mesh=ways, ignored_params=whole)
    fully_shard(model, mesh=ways, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def architecture(model: nn.Module) -> str:
    """The name of a model's class, under the one that FSDP2 gives it."""
    from torch.distributed.fsdp import FSDPModule

    return next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
