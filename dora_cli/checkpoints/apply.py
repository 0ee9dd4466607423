"""Put a saved adapter into a model in memory: to evaluate it, or to start from it."""

import json
from collections.abc import Mapping

import torch
from torch import nn

from dora_cli.adapters.base import AdapterLayer, LowRankLayer, is_packed, is_transposed, linear_shape
from dora_cli.adapters.lora import LoraLayer
from dora_cli.adapters.mora import RotationLayer
from dora_cli.adapters.token_rows import TokenRows
from dora_cli.adapters.weight_decomposed import WeightDecomposedLayer
from dora_cli.checkpoints.adapter_file import AdapterFile
from dora_cli.checkpoints.adapter_format import LowRank, Square, WeightDecomposed
from dora_cli.checkpoints.safetensors_io import read_tensor
from dora_cli.checkpoints.token_rows import TokenUpdate
from dora_cli.errors import UserError


def apply_adapter(model: nn.Module, adapter: AdapterFile) -> None:
    """Make ``model`` the model that was trained: adapters as layers, heads and replaced parameters as values.

    Raises:
        UserError: something in the adapter matches nothing in the model, or has another shape.
    """
    _load_values(model, {**adapter.head, **adapter.replaced}, adapter)
    for name, tokens in adapter.tokens.items():
        weight: torch.Tensor = _module(model, name, adapter).weight  # type: ignore[assignment]
        if weight.shape[0] <= max(tokens.ids) or weight.shape[1:] != tokens.rows.shape[1:]:
            raise UserError(
                f"the adapter does not fit the base: '{name}' has the shape {list(weight.shape)}",
                where=f"{adapter.folder} has embeddings of the tokens {tokens.ids[:5]}",
                hint="give the base that the adapter was trained on, with base=, or let dora-merge make room first",
            )
        with torch.no_grad():
            weight[tokens.ids] = read_tensor(tokens.rows).to(weight)
    for name, update in adapter.modules.items():
        base = _module(model, name, adapter)
        shape = linear_shape(base)
        if shape != update.shape:
            raise UserError(
                f"the adapter does not fit the base: module '{name}' is {shape[0]}×{shape[1]}",
                where=f"{adapter.folder} has an update of {update.shape[0]}×{update.shape[1]} for it",
                hint="give the base that the adapter was trained on, with base=",
            )
        if isinstance(update, WeightDecomposed) and not is_packed(base):
            _set_decomposed(base, update)
        elif update.rank or isinstance(update, WeightDecomposed):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _layer(base, update))
    model.eval()


def start_from(layers: Mapping[str, AdapterLayer], model: nn.Module, adapter: AdapterFile) -> int:
    """Load a trained low-rank adapter into freshly injected layers, and its head where it fits. Returns modules filled.

    Raises:
        UserError: a kind of adapter that can't be a start, a module that is not adapted here, or one too large.
    """
    for name, tokens in adapter.tokens.items():
        _start_rows(model, name, tokens, adapter)
    filled = 0
    for name, update in adapter.modules.items():
        layer = layers.get(name)
        if layer is None:
            raise UserError(
                f"adapter.init_from={adapter.folder}: its module '{name}' has no adapter here",
                hint="adapt it too (adapter.targets), or raise the budget so that it starts with a component",
            )
        kind = WeightDecomposedLayer if isinstance(update, WeightDecomposed) else LowRankLayer
        if isinstance(update, Square) or not isinstance(layer, kind):
            raise UserError(
                f"adapter.init_from={adapter.folder}: its module '{name}' cannot be the start of this method's",
                hint="low-rank methods can start from a plain pair, and weight_decomposed also from its own kind",
            )
        if update.rank:
            layer.load_low_rank(update.a, update.b)
            if isinstance(update, WeightDecomposed) and isinstance(layer, WeightDecomposedLayer):
                layer.load_magnitude(update.magnitude)
            filled += 1
    shapes = {n: p.shape for n, p in model.named_parameters()}
    fitting = {n: t for n, t in adapter.head.items() if shapes.get(n) == t.shape}
    _load_values(model, fitting, adapter)  # another number of labels needs a head of its own
    return filled


def _start_rows(model: nn.Module, name: str, tokens: TokenUpdate, adapter: AdapterFile) -> None:
    mine, words = _module(model, name, adapter), adapter.method.get("added_tokens")
    if not isinstance(mine, TokenRows) or mine.ids.tolist() != tokens.ids:
        raise UserError(
            f"adapter.init_from={adapter.folder}: it has embeddings of new tokens, and here they are not the same",
            hint=f"set 'model.add_tokens={json.dumps(words, ensure_ascii=False)}'" if words else None,
        )
    with torch.no_grad():
        mine.rows.copy_(read_tensor(tokens.rows))


def _layer(base: nn.Module, update: LowRank | Square) -> AdapterLayer:
    if isinstance(update, Square):
        return RotationLayer(base, update.m, 0.0)
    if isinstance(update, WeightDecomposed):
        layer = WeightDecomposedLayer(base, update.a, update.b, 1.0, 0.0)
        layer.load_magnitude(update.magnitude)
        return layer
    return LoraLayer(base, update.a, update.b, None, 1.0, 0.0)


def _module(model: nn.Module, name: str, adapter: AdapterFile) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"the adapter does not fit the base: the model has no module '{name}'",
            where=f"in {adapter.folder}",
            hint="give the base that the adapter was trained on, with base=",
        ) from None


def _load_values(model: nn.Module, values: Mapping[str, torch.Tensor], adapter: AdapterFile) -> None:
    state = model.state_dict(keep_vars=True)
    for name, value in values.items():
        if name not in state or state[name].shape != value.shape:
            found = tuple(state[name].shape) if name in state else "no such tensor"
            raise UserError(
                f"the adapter does not fit the base: '{name}' {tuple(value.shape)} against {found}",
                where=f"in {adapter.folder}",
                hint="give the base that the adapter was trained on, with base=",
            )
        with torch.no_grad():
            state[name].copy_(value)


def _set_decomposed(base: nn.Module, update: LowRank) -> None:
    """W' = diag(m / ‖W + BA‖_row) (W + BA), in float32 (METHODS 4)."""
    assert isinstance(update, WeightDecomposed)
    weight: torch.Tensor = base.weight  # type: ignore[assignment]
    with torch.no_grad():
        dense = (weight.T if is_transposed(base) else weight).float() + update.b @ update.a
        dense = dense * (update.magnitude / dense.norm(dim=1).clamp_min(1e-12))[:, None]
        weight.copy_(dense.T if is_transposed(base) else dense)
