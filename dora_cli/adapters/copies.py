"""Copies of units, moments included, which can be put back to the bit."""

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.optim import Optimizer

from dora_cli.adapters.base import AdapterLayer


def copied(layer: AdapterLayer, units: Tensor, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """The values of ``units`` (positions along the unit axis) in every parameter that has them, and their moments.

    Returns:
        Parameter → its rows (or columns) of these units; ``PARAMETER.MOMENT`` → the same of what the optimizer keeps
        for each number, where it has stepped.
    """
    return {
        _key(name, moment): tensor.index_select(axis, units)
        for name, moment, tensor, axis in unit_tensors(layer, optimizer)
    }


def put_back(layer: AdapterLayer, units: Tensor, copies: Mapping[str, Tensor], optimizer: Optimizer | None) -> None:
    """Give ``units`` the values and moments that they had; as many as there were, wherever they are by now."""
    for name, moment, tensor, axis in unit_tensors(layer, optimizer):
        if (key := _key(name, moment)) in copies:
            tensor.index_copy_(axis, units, copies[key].to(tensor.device))


def unit_tensors(layer: AdapterLayer, optimizer: Optimizer | None) -> Iterator[tuple[str, str, Tensor, int]]:
    """(parameter, moment or "", whole tensor, axis of its units) of a layer's parameters and of their moments."""
    for name, axis in layer.unit_axes.items():
        parameter = getattr(layer, name)
        yield name, "", parameter.detach(), axis
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for moment, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:  # the step count has no units
                yield name, moment, value, axis


def _key(name: str, moment: str) -> str:
    return f"{name}.{moment}" if moment else name
