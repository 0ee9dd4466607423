"""Trained adapters as files: plain PEFT LoRA wherever ΔW has low rank, a type of our own where it has not.

An adapter folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's layout, which is all that
inference needs, and beside them ``method.json`` and ``method_state.safetensors``: what is particular to a method.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from dora_cli.checkpoints.atomic import atomic_folder, atomic_write_text, save_tensors
from dora_cli.checkpoints.manifest import write_manifest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
METHOD = "method.json"
STATE = "method_state.safetensors"
PREFIX = "base_model.model."  # PEFT's two wrappers around the model
TOKENS = "token_adapter.trainable_tokens_delta"  # whole rows, whatever PEFT calls them
SQUARE = "mora_M"  # the square's name below its module's


@dataclass(eq=False)
class LowRank:
    """One module's update ΔW = B A, every scale folded in.

    Attributes:
        name: full module name.
        a: shape ``(r, d_in)``, float32.
        b: shape ``(d_out, r)``, float32.
        transposed: whether the module stores its weight as ``(d_in, d_out)``, as GPT-2's ``Conv1D`` does.
    """

    name: str
    a: Tensor
    b: Tensor
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.b.shape[0], self.a.shape[1]


@dataclass(eq=False)
class WeightDecomposed(LowRank):
    """One module's new weight diag(m / n) (W + B A), n the norms of the rows of W + B A (METHODS 4).

    Attributes:
        magnitude: m, shape ``(d_out,)``, float32.
    """

    magnitude: Tensor = field(kw_only=True)


@dataclass(eq=False)
class Square:
    """One module's update by one square matrix over rotated blocks of the input (MoRA's rotation, METHODS 9).

    Attributes:
        name: full module name.
        m: shape ``(side, side)``, float32; the side is even.
        shape: ``(d_out, d_in)`` of the module.
        transposed: as in ``LowRank``.
    """

    name: str
    m: Tensor
    shape: tuple[int, int]
    transposed: bool = False

    @property
    def rank(self) -> int:
        """The side of the square; 0 where there is no update."""
        return self.m.shape[0]


@dataclass(eq=False)
class TokenRows:
    """New rows of an embedding (or of an output layer): those of some tokens.

    Attributes:
        name: full module name.
        ids: the tokens.
        rows: shape ``(len(ids), d)``; they take the place of the base's, or follow on them.
    """

    name: str
    ids: list[int]
    rows: Tensor


def write_adapter(
    folder: str | os.PathLike[str],
    *,
    modules: Sequence[LowRank],
    head: Mapping[str, Tensor],
    head_modules: Sequence[str],
    base_name: str | None,
    task_type: str | None,
    export: str = "exact",
    method: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
    revision: str | None = None,
    tokens: Sequence[TokenRows] = (),
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write low-rank updates and trained heads as a PEFT LoRA adapter whose scale is 1 in every module.

    The folder appears whole, replacing one that is there.

    Args:
        modules: every adapted module, those of rank 0 too; all ``WeightDecomposed`` or none.
        head: full parameter name → tensor, of everything that was trained in full.
        head_modules: the largest modules that ``head`` covers completely (PEFT copies whole modules). PEFT compares
            these names by their ends; ``saved_by_peft`` says what it will then want to find.
        base_name: where the base model comes from, as the user named it.
        task_type: PEFT's name of the task (``SEQ_CLS``), or null for any model.
        export: ``exact`` keeps each module's rank and leaves rank 0 out; ``uniform`` fills every module with zero
            components up to the largest rank, for servers that ignore per-module ranks.
        method: written to ``method.json``. Merging reads ``architecture`` (the class), ``base_model_prefix`` and
            ``model_config`` (the configuration as trained) from it.
        state: tensors for ``method_state.safetensors``: scores, gates, history.
        revision: branch, tag or commit of the base on the hub.
        tokens: rows of new tokens, PEFT's ``trainable_token_indices``.
        beside: puts other files into the folder, such as the tokenizer that knows them, before all is listed.
    """
    _check(modules)
    decomposed = isinstance(modules[0], WeightDecomposed)
    # a component of zeros changes nothing: PEFT knows no rank 0, wants one target at least, and a magnitude its LoRA
    if export == "uniform":
        rank = max(1, *(module.rank for module in modules))
        kept = [_filled(module, rank) for module in modules]
    elif decomposed:
        kept = [_filled(module, max(1, module.rank)) for module in modules]
    else:
        kept = [module for module in modules if module.rank] or [_filled(modules[0], 1)]
    rank = max(module.rank for module in kept)
    pattern = {anchored(module.name): module.rank for module in kept if module.rank != rank}
    config = {
        **_common("LORA", base_name, revision, task_type, head_modules),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": [module.name for module in kept],
        "fan_in_fan_out": any(module.transposed for module in kept),  # PEFT corrects it module by module
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": decomposed,
        "init_lora_weights": True,
    }
    if tokens:  # a key that PEFT before 0.15 does not know
        config["trainable_token_indices"] = {rows.name: rows.ids for rows in tokens}
    tensors = {}
    for module in kept:
        tensors[f"{PREFIX}{module.name}.lora_A.weight"] = module.a.float()
        tensors[f"{PREFIX}{module.name}.lora_B.weight"] = module.b.float()
        if isinstance(module, WeightDecomposed):
            tensors[f"{PREFIX}{module.name}.lora_magnitude_vector"] = module.magnitude.float()
    tensors |= {f"{PREFIX}{rows.name}.{TOKENS}": rows.rows.float() for rows in tokens}
    tensors |= {PREFIX + name: tensor for name, tensor in head.items()}
    _write(Path(folder), config, tensors, {**method, "export": export}, state, beside)


def write_full(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    head_modules: Sequence[str],
    base_name: str | None,
    task_type: str | None,
    method: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
    revision: str | None = None,
) -> None:
    """Write whole trained parameters, for methods whose ΔW has no low rank, as a type of our own (``FULL``).

    Args:
        tensors: full parameter name → trained tensor.
        head_modules: the modules among them that the base may lack or hold in another shape.

    The other arguments are those of ``write_adapter``.
    """
    config = _common("FULL", base_name, revision, task_type, head_modules)
    _write(Path(folder), config, tensors, method, state)


def write_square(
    folder: str | os.PathLike[str],
    modules: Sequence[Square],
    *,
    head: Mapping[str, Tensor],
    head_modules: Sequence[str],
    base_name: str | None,
    task_type: str | None,
    method: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
    revision: str | None = None,
) -> None:
    """Write square updates and trained heads as a type of our own (``MORA``), which PEFT does not read.

    Args:
        modules: every adapted module; those without an update are left out of the file.

    The other arguments are those of ``write_adapter``.
    """
    kept = [module for module in modules if module.rank]
    config = {
        **_common("MORA", base_name, revision, task_type, head_modules),
        "kind": "rotation",
        "modules": {m.name: {"side": m.rank, "d_out": m.shape[0], "d_in": m.shape[1]} for m in kept},
        "fan_in_fan_out": any(module.transposed for module in kept),
    }
    tensors = {f"{PREFIX}{module.name}.{SQUARE}": module.m.float() for module in kept}
    tensors |= {PREFIX + name: tensor for name, tensor in head.items()}
    _write(Path(folder), config, tensors, method, state)


def saved_by_peft(names: Iterable[str], head_modules: Sequence[str], task_type: str | None) -> list[str]:
    """The largest modules that PEFT will copy, and look for in the file, when it reads ``modules_to_save``.

    PEFT compares names by their ends and adds ``classifier`` and ``score`` for classification, so DistilBERT's
    ``pre_classifier`` is wanted as soon as ``classifier`` is saved.

    Args:
        names: the full names of all modules of the model.
        head_modules: the modules that were trained in full.
    """
    ends = (*head_modules, *(("classifier", "score") if task_type in ("SEQ_CLS", "TOKEN_CLS") else ()))
    found = [name for name in names if name and name.endswith(ends)]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def anchored(name: str) -> str:
    """A key of ``rank_pattern`` that matches this module and no other: PEFT reads keys as patterns."""
    return "^" + re.escape(name)


def _check(modules: Sequence[LowRank]) -> None:
    if not modules:
        raise ValueError("an adapter has at least one module; write_full writes a head alone")
    if len({module.name for module in modules}) < len(modules):
        raise ValueError("two modules have one name")
    if len({type(module) for module in modules}) > 1:
        raise ValueError("PEFT has one use_dora for all modules: all are WeightDecomposed or none")
    for module in modules:
        if module.a.dim() != 2 or module.b.dim() != 2 or module.a.shape[0] != module.b.shape[1]:
            raise ValueError(f"{module.name}: a {tuple(module.a.shape)} and b {tuple(module.b.shape)} do not agree")


def _filled(module: LowRank, rank: int) -> LowRank:
    """The same update with components of zeros up to ``rank``."""
    more = rank - module.rank
    a, b = pad(module.a, (0, 0, 0, more)), pad(module.b, (0, more))
    if isinstance(module, WeightDecomposed):
        return WeightDecomposed(module.name, a, b, module.transposed, magnitude=module.magnitude)
    return LowRank(module.name, a, b, module.transposed)


def _common(
    kind: str, base_name: str | None, revision: str | None, task_type: str | None, head_modules: Sequence[str]
) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        "modules_to_save": list(head_modules) or None,
    }


def _write(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    method: Mapping[str, Any],
    state: Mapping[str, Tensor] | None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    with atomic_folder(path, replace=True) as folder:
        save_tensors(folder / WEIGHTS, tensors)
        atomic_write_text(folder / CONFIG, json.dumps(config, indent=2))
        atomic_write_text(folder / METHOD, json.dumps(dict(method), indent=2))
        if state:
            save_tensors(folder / STATE, state)
        if beside:
            beside(folder)
        write_manifest(folder)
