"""Frozen bases with packed weights: how they are loaded, what they compute with, and what they hold.

Only linear layers inside transformer layers are packed; embeddings, heads and norms are not. Afterwards each packed
layer has a method ``dense_weight()``, by which the other rooms know it and look at its numbers.
"""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_cli.errors import UserError

STORED = "stored"  # the kind of a base whose folder holds packed weights


@dataclass(frozen=True)
class Kind:
    """A way to pack the weights of linear layers.

    Attributes:
        package: what does it; also the name of the extra.
        bytes_per_weight: of a packed layer, its scales included; those of one number a row are left out.
    """

    package: str
    bytes_per_weight: float


KINDS = {
    "bnb_nf4": Kind("bitsandbytes", 0.5 + 1 / 64 + 4 / (64 * 256)),  # scales of 64 weights are packed to 8 bits, too
    "bnb_int8": Kind("bitsandbytes", 1.0),
    "ao_int8": Kind("torchao", 1.0),
}


@dataclass(frozen=True)
class Quantised:
    """What is packed in a loaded base.

    Attributes:
        kind: one of ``KINDS``, or ``stored``.
        dtype: of the weights that were packed, ``float32`` or ``bfloat16`` …
        modules: full name → whether the checkpoint stores that weight as (d_in, d_out).
    """

    kind: str
    dtype: str
    modules: dict[str, bool]


def require_package(kind: str) -> None:
    """Refuse a kind of quantisation whose package is not installed.

    Raises:
        UserError: naming the extra that brings it.
    """
    _require(KINDS[kind].package, f"model.quantization={kind}")


def _require(package: str, what: str) -> None:
    missing = [name for name in (package, "accelerate") if find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs the package {missing[0]}", hint=f"pip install 'dora-cli[{package}]'")


def stored_package(settings: Any, name: str) -> str | None:
    """Which package packed the weights that a checkpoint holds; None where they are not packed.

    Raises:
        UserError: one that is not read here, or not installed.
    """
    found = getattr(settings, "quantization_config", None)
    if not found:
        return None
    package = str(found.get("quant_method") if isinstance(found, dict) else found.quant_method.value)
    if package != "bitsandbytes":
        raise UserError(
            f"model.name={name} holds weights quantised by {package}, which cannot be trained on here",
            hint=f"name the original, and choose one of model.quantization={', '.join(KINDS)}",
        )
    _require(package, f"model.name={name} holds weights quantised by {package}: it")
    return package


def loading_options(
    kind: str, auto: Any, settings: Any, compute: torch.dtype, device: str, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What ``from_pretrained`` has to be told, so that weights are packed one by one as they are read.

    Args:
        kind: one of ``KINDS``, or ``stored``.
        auto: transformers' class for the task.
        settings: the model's configuration.
        compute: the type that the packed layers multiply in.
        device: where they are packed, and stay.
    """
    options: dict[str, Any] = {"device_map": {"": device}}
    if kind == STORED:
        return options
    from transformers import BitsAndBytesConfig, TorchAoConfig

    with torch.device("meta"):
        skeleton = auto.from_config(settings, trust_remote_code=trust_remote_code)
    # As patterns that match nothing but this name; torchao is asked about parameters.
    skipped = [rf"^{re.escape(name)}(\.weight)?$" for name in not_packed(skeleton)]
    if kind == "ao_int8":
        from torchao.quantization import Int8WeightOnlyConfig

        chosen: Any = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    elif kind == "bnb_int8":
        chosen = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    else:
        chosen = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=skipped,
        )
    return {**options, "quantization_config": chosen}


def not_packed(model: Any) -> list[str]:
    """The linear layers that stay as they are: outside the transformer layers, in a head, or with a single output."""
    base = {id(module) for module in model.base_model.modules()}
    layers = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and id(m) in base)
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    return [name for name, module in linear if not name.startswith(layers) or 1 in module.weight.shape]


def quieten() -> None:
    """What the packages say of themselves at every call or import; errors are still heard."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # the last while torchao is imported
        logging.getLogger(name).setLevel(logging.ERROR)


def settle(model: Any, kind: str, compute: torch.dtype, name: str) -> Quantised:
    """Give the packed layers of a model just loaded what the other rooms need, and say which they are.

    Raises:
        UserError: nothing was packed, or something was not that should be.
    """
    modules: dict[str, bool] = {}
    for full_name, module in model.named_modules():
        if (dense := _dequantiser(module)) is None:
            continue
        if module.weight.is_floating_point() and not hasattr(module.weight, "qdata"):
            raise UserError(
                f"model.name={name}: its '{full_name}' should be packed, and is not",
                hint="its config.json says so, where llm_int8_skip_modules does not name it",
            )
        module.dense_weight = partial(dense, module)
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype, module.compute_type_is_set = compute, True
            module.weight.quant_state.dtype = compute
            # In evaluation it would lay the weights out for AVX-512, rounded, and then give no gradients any more.
            module.support_avx512bf16_for_cpu = False
        elif type(module) is nn.Linear:
            module.__class__ = RecomputedLinear
        modules[full_name] = stored_transposed(module)
    if not modules:
        raise UserError(
            f"model.quantization={kind} finds nothing to pack in {name}, a {type(model).__name__}",
            hint="set model.quantization=null"
            + (", or a kind of bitsandbytes, which packs GPT-2's layers too" if kind == "ao_int8" else ""),
        )
    for tensor in (*model.parameters(), *model.buffers()):
        # What is not packed may lie in the mapped file, which would stay in memory with all that was read of it.
        if type(tensor) in (nn.Parameter, Tensor) and tensor.device.type == "cpu" and tensor.is_floating_point():
            tensor.data = tensor.data.clone()
    del model.config.quantization_config  # of what is saved from here on nothing is packed
    return Quantised(kind, str(model.dtype).removeprefix("torch."), modules)


def stored_transposed(module: nn.Module) -> bool:
    """Whether the checkpoint stores the weight as (d_in, d_out), which a packed layer no longer does."""
    kind = getattr(module, "source_cls", type(module))
    return kind.__name__ == "Conv1D"


def _dequantiser(module: nn.Module) -> Callable[[Any], Tensor] | None:
    if not isinstance(module, nn.Linear):
        return None
    if type(module).__name__ == "Linear4bit":
        return _dense_4bit
    if type(module).__name__ == "Linear8bitLt":
        return _dense_8bit
    return _dense_ao if hasattr(module.weight, "qdata") else None


def _dense_4bit(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = module.weight.quant_state
    dtype, state.dtype = state.dtype, torch.float32  # the type that comes out
    try:
        return dequantize_4bit(module.weight.data, state)
    finally:
        state.dtype = dtype


def _dense_8bit(module: Any) -> Tensor:
    scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return module.weight.data.float() * (scales.float() / 127)[:, None]


def _dense_ao(module: Any) -> Tensor:
    return module.weight.dequantize(torch.float32)


def round_trip(weight: Tensor, kind: str) -> Tensor:
    """What a layer computes with that holds ``weight`` (d_out, d_in) packed: the same shape, float32.

    Args:
        weight: in the type from which it was packed in training (``Quantised.dtype``).
        kind: one of ``KINDS``.
    """
    if kind == "ao_int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig())
        return _dense_ao(layer)
    from bitsandbytes import functional

    if kind == "bnb_int8":
        packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return packed.float() * (scales.float() / 127)[:, None]
    packed, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    state.dtype = torch.float32
    return functional.dequantize_4bit(packed, state)


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every plain tensor that a model holds: parameters and buffers, of packed ones numbers and scales.

    Several may share a storage.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            yield from plain_tensors(tensor)
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            inner = [state, state.state2] if state.nested else [state]
            yield from (t for s in inner for t in (s.absmax, s.code))
        if type(module).__name__ == "Linear8bitLt":
            yield from (t for s in (module.weight, module.state) for t in (s.CB, s.SCB) if t is not None)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor holds: itself, or of one of torchao's its numbers and scales."""
    if not hasattr(tensor, "qdata"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield getattr(tensor, name)


def held_bytes(model: nn.Module) -> int:
    """Of all that a model holds, each storage once."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in held_tensors(model))}
    return sum(storages.values())


def weight_count(model: nn.Module) -> int:
    """How many weights a model has: those of packed layers as they were before."""
    packed = [m for m in model.modules() if isinstance(m, nn.Linear) and hasattr(m, "dense_weight")]
    own = {id(m.weight) for m in packed}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in own)
    return rest + sum(m.in_features * m.out_features for m in packed)


class RecomputedLinear(nn.Linear):
    """A frozen linear layer whose dense weight lives only while it is multiplied with, in each direction.

    torchao's own product keeps it from forward to backward, in every layer: as much as was saved, and more.
    """

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            return _Product.apply(x.to(dtype), self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # frozen, and no plain tensor
        return nn.functional.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.dequantize(grad.dtype), None, None
