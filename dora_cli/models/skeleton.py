"""Models without their numbers, for a plan: of weights that are not here, or that no memory here could hold."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_cli.models.quantised import KINDS, not_packed


def can_hold(source: str, revision: str | None) -> bool:
    """Whether the weights are on this machine, and no larger than its memory."""
    if Path(source).is_dir():
        files = list(Path(source).glob("*.safetensors"))
        return 0 < sum(file.stat().st_size for file in files) < machine_memory()
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    found = [try_to_load_from_cache(source, name, revision=revision) for name in names]
    paths = [Path(path) for path in found if isinstance(path, str)]
    # Of a model of several files all lie beside the index.
    return bool(paths) and can_hold(str(paths[0].parent), None)


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def skeleton(auto: Any, settings: Any, as_stored: bool, trust: bool) -> Any:
    """The model without its numbers, each parameter in the type in which it would be loaded."""
    dtype = (getattr(settings, "dtype", None) if as_stored else None) or torch.float32
    with torch.device("meta"):
        return auto.from_config(settings, dtype=dtype, trust_remote_code=trust)


def outside_base(model: Any) -> set[str]:
    """What a pretrained checkpoint leaves to the task: nothing of a language model, else all that is not the base."""
    if model.get_output_embeddings() is not None:
        return set()
    base = {id(p) for p in model.base_model.parameters()}
    return {name for name, p in model.named_parameters() if id(p) not in base}


def saved_by_packing(model: Any, kind: str | None) -> dict[int, int]:
    """Which bytes of a hollow model ``model.quantization=kind`` would save: id of a parameter → bytes."""
    if kind is None:
        return {}
    dense = set(not_packed(model))
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    each = KINDS[kind].bytes_per_weight
    return {id(m.weight): m.weight.nbytes - round(m.weight.numel() * each) for n, m in linear if n not in dense}
