"""What a run leaves: its weights as they are, in the layout that serves them (DESIGN 5)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dora_cli.adapters.base import AdapterLayer, linear_shape
from dora_cli.adapters.mora import MoraLayer
from dora_cli.adapters.weight_decomposed import WeightDecomposedLayer
from dora_cli.checkpoints.adapter_format import (
    LowRank,
    Square,
    TokenRows,
    WeightDecomposed,
    saved_by_peft,
    write_adapter,
    write_full,
    write_square,
)
from dora_cli.models.quantised import stored_transposed
from dora_cli.training.setup import Session
from dora_cli.training.shard import architecture
from dora_cli.training.summary import Trained, rank_map


def write_result(session: Session, folder: Path, record: dict[str, Any]) -> None:
    """Write a run's weights as they are into ``folder``, in PEFT's layout where ΔW has low rank (DESIGN 5)."""
    write_trained(
        session,
        folder,
        {
            "recipe": session.composed.recipe,
            "step": record["step"],
            "metrics": record["metrics"],
            "added_tokens": session.config.model.add_tokens,
            "quantization": asdict(session.quantised) if session.quantised else None,
        },
        task_type=session.task.peft_task_type,
        base_name=session.source,
        revision=session.config.model.revision,
        tokens=[TokenRows(n, la.ids.tolist(), la.rows.detach().cpu()) for n, la in session.token_rows.items()],
        beside=session.tokenizer.save_pretrained if session.new_tokens else None,
    )


def write_trained(
    trained: Trained,
    folder: Path,
    about: Mapping[str, Any],
    *,
    task_type: str | None,
    base_name: str | None,
    revision: str | None = None,
    tokens: Sequence[TokenRows] = (),
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write weights as they are into ``folder``; ``about`` goes into ``method.json`` beside what they say themselves.

    The other arguments are those of ``write_adapter``.
    """
    composed, model = trained.composed, trained.model
    method = {
        **about,
        "method": composed.method,
        "parts": composed.names,
        "architecture": architecture(model),
        "base_model_prefix": getattr(model, "base_model_prefix", ""),
        "model_config": _model_config(model),
        "ranks": rank_map(trained),
        "modules": trained.allocation.table.names,  # what ``module`` in method_state.safetensors counts
    }
    heads = saved_by_peft((n for n, _ in model.named_modules()), trained.head_modules, task_type)
    # Of the heads alone: asked for all of it, a sharded model would let go of what the other processes still hold.
    head = {k: v for name in heads for k, v in model.get_submodule(name).state_dict(prefix=f"{name}.").items()}
    common: dict[str, Any] = {
        "head_modules": heads,
        "base_name": base_name,
        "revision": revision,
        "task_type": task_type,
        "method": method,
    }
    kind = composed.parts["adapter"].export
    if kind == "full":
        parameters = {n: p.detach() for n, p in trained.trained_parameters().items()}
        write_full(folder, {**parameters, **head}, **common)
        return
    if kind == "square":
        squares = [_square(name, layer) for name, layer in trained.layers.items() if layer.active]
        write_square(folder, squares, head=head, state=trained.allocation.unit_state(), **common)
        return
    modules = [low_rank(trained, name) for name in trained.targets]
    if kind == "decomposed":  # then what is its base again stays out of the file
        modules = [module for module in modules if isinstance(module, WeightDecomposed)] or modules
    write_adapter(
        folder,
        modules=modules,
        head=head,
        export=composed.config.export,
        state=trained.allocation.unit_state(),
        tokens=tokens,
        beside=beside,
        **common,
    )


def low_rank(trained: Trained, name: str) -> LowRank:
    """The living components of one target module; none where it has no adapter (any more)."""
    table = trained.allocation.table
    if name not in trained.layers:
        return _nothing(name, trained.model.get_submodule(name))
    layer = trained.layers[name]
    a, b = layer.low_rank()
    if not layer.active:
        return _nothing(name, layer.base_layer)
    if table.kind == "components":
        living = table.contributing()[table.rows[table.names.index(name)]].to(a.device)
        a, b = a[living], b[:, living]
    if isinstance(layer, WeightDecomposedLayer):
        magnitude = layer.magnitude.detach().cpu()
        return WeightDecomposed(name, a.cpu(), b.cpu(), stored_transposed(layer.base_layer), magnitude=magnitude)
    return LowRank(name, a.cpu(), b.cpu(), stored_transposed(layer.base_layer))


def _square(name: str, layer: AdapterLayer) -> Square:
    assert isinstance(layer, MoraLayer)
    return Square(name, layer.m.detach().cpu(), (layer.d_out, layer.d_in), stored_transposed(layer.base_layer))


def _nothing(name: str, module: torch.nn.Module) -> LowRank:
    d_out, d_in = linear_shape(module)
    return LowRank(name, torch.empty(0, d_in), torch.empty(d_out, 0), stored_transposed(module))


def _model_config(model: Any) -> dict[str, Any]:
    """The configuration as trained: labels, problem type, pad token; of a model of transformers'."""
    settings: dict[str, Any] = model.config.to_diff_dict() if hasattr(model, "config") else {}
    return settings
