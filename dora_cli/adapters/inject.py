"""Put adapters into a model and take them out: find by full name, replace on the parent, keep the original inside."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from dora_cli.adapters.base import AdapterLayer
from dora_cli.errors import UserError


class Part(Protocol):
    """What ``inject`` needs of an adapter part."""

    def layer(self, base: nn.Module, rank: int) -> AdapterLayer: ...


def inject(model: nn.Module, targets: Sequence[str], part: Part, ranks: Sequence[int]) -> dict[str, AdapterLayer]:
    """Replace each target module by its adapted layer. The model itself is changed; its weights are not.

    Args:
        model: any module.
        targets: full names of linear modules, in the order that ties are broken by.
        part: the adapter's options.
        ranks: components of each target at the start, 0 included.

    Returns:
        Full name → layer, in the order of ``targets``.

    Raises:
        UserError: a name is not in the model or is already adapted.
    """
    layers: dict[str, AdapterLayer] = {}
    for name, rank in zip(targets, ranks, strict=True):
        parent, child = _locate(model, name)
        base = getattr(parent, child)
        if isinstance(base, AdapterLayer):
            raise UserError(f"module '{name}' already has an adapter")
        layer = part.layer(base, rank)
        layer.train(base.training)
        setattr(parent, child, layer)
        layers[name] = layer
    return layers


def remove(model: nn.Module, name: str) -> None:
    """Put the base layer of an adapted module back in its place."""
    parent, child = _locate(model, name)
    layer = getattr(parent, child)
    if isinstance(layer, AdapterLayer):
        setattr(parent, child, layer.base_layer)


def parameter_groups(layers: Mapping[str, AdapterLayer], *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of the adapters' trainable parameters: those that decay, and gates and vectors, which do not."""
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for layer in layers.values():
        for name, parameter in layer.adapter_parameters().items():
            if parameter.requires_grad and parameter.numel():
                (undecayed if name in layer.no_decay else decayed).append(parameter)
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": undecayed, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Parent module and attribute name of the module called ``name``."""
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        parent.get_submodule(child)
    except AttributeError:
        raise UserError(f"the model has no module '{name}'") from None
    return parent, child
