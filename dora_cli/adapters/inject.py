"""Put adapters into a model and take them out: find by full name, replace on the parent, keep the original inside."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from dora_cli.adapters.base import AdapterLayer
from dora_cli.errors import UserError

Role = tuple[float | None, bool]  # a rate of its own, or the adapter's; whether weight decay applies


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
        parent, child = locate(model, name)
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
    parent, child = locate(model, name)
    layer = getattr(parent, child)
    if isinstance(layer, AdapterLayer):
        setattr(parent, child, layer.base_layer)


def parameter_groups(layers: Mapping[str, AdapterLayer], *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of the adapters' trainable parameters, one for each rate and each kind of decay.

    Gates, vectors and magnitudes do not decay. A group names its ``role``, so that parameters find back into it.
    """
    groups: list[dict[str, Any]] = []
    members = _members(layers)
    for role in dict.fromkeys([*members, *_members(layers, trainable=False)]):
        rate, decays = role
        groups.append(
            {
                "params": members.get(role, []),
                "lr": lr if rate is None else rate,
                "weight_decay": weight_decay if decays else 0.0,
                "role": role,
            }
        )
    return groups


def regroup(layers: Mapping[str, AdapterLayer], optimizer: Optimizer) -> None:
    """After freezing or thawing: exactly what trains is in the optimizer, in the order of ``parameter_groups``."""
    members = _members(layers)
    for group in optimizer.param_groups:
        if "role" in group:
            group["params"] = members.get(group["role"], [])


def _members(layers: Mapping[str, AdapterLayer], *, trainable: bool = True) -> dict[Role, list[nn.Parameter]]:
    members: dict[Role, list[nn.Parameter]] = {}
    for layer in layers.values():
        for name, parameter in layer.adapter_parameters().items():
            if (parameter.requires_grad or not trainable) and parameter.numel():
                role = (layer.learning_rates.get(name), name not in layer.no_decay)
                members.setdefault(role, []).append(parameter)
    return members


def locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Parent module and attribute name of the module called ``name``."""
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        parent.get_submodule(child)
    except AttributeError:
        raise UserError(f"the model has no module '{name}'") from None
    return parent, child
