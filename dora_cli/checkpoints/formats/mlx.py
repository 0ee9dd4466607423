"""MLX-LM's adapters (``mlx_lm.lora``): LoRA, and its ``dora``, which is the weight-decomposed one.

``adapters.safetensors`` holds ``MODULE.lora_a`` (d_in, r) and ``MODULE.lora_b`` (r, d_out), PEFT's factors turned
over: ΔW = scale · lora_bᵀ lora_aᵀ, one scale and one rank for all modules, and of ``dora`` also ``MODULE.m`` (d_out,).
Modules are called as the tensors in the base's files, which MLX-LM loads by their names (of most families).
"""

from pathlib import Path
from typing import Any

from dora_cli.checkpoints.adapter_file import Contents, Format, Update, check_update, group
from dora_cli.checkpoints.json_io import take
from dora_cli.checkpoints.safetensors_io import Entry
from dora_cli.errors import UserError

WEIGHTS = "adapters.safetensors"
SETTINGS = "lora_parameters"
PARTS = {"lora_a": "a", "lora_b": "b"}
SUFFIXES = {"lora": PARTS, "dora": PARTS | {"m": "magnitude"}}


def _read(config: dict[str, Any], entries: dict[str, Entry], file: Path) -> Contents:
    kind = take(config, "fine_tune_type", str, file, "lora")
    if kind not in SUFFIXES:
        raise UserError(
            f"{file.parent} holds an MLX-LM adapter of fine_tune_type {kind}",
            hint=f"read are: {', '.join(SUFFIXES)}; mlx_lm.fuse makes a whole model of any other",
        )
    settings = take(config, SETTINGS, dict, file)
    scale, rank = take(settings, "scale", (int, float), file), take(settings, "rank", int, file)
    if rank < 1 or not 0 < abs(scale) < 1e9:
        raise UserError(f"{file} is damaged", where=f"rank is {rank} and scale is {scale}")
    weights = file.with_name(WEIGHTS)
    grouped, rest = group(entries, SUFFIXES[kind], weights)
    if rest:
        raise UserError(f"{weights}: '{min(rest)}' is no part of an adapter that is read here")
    modules = {}
    for name, parts in grouped.items():
        modules[name] = Update(name=name, scale=scale, transposed=False, flipped=True, **parts)
        check_update(modules[name], rank, file)
    base = take(config, "model", str, file, None)
    return Contents(kind="LORA", modules=modules, base_name=base, task_type="CAUSAL_LM", prefix="")


MLX = Format(
    title="MLX-LM",
    weights=WEIGHTS,
    convert="load it once with mlx.core.load, and save that with mlx.core.save_safetensors as adapters.safetensors",
    knows=lambda config: SETTINGS in config and "peft_type" not in config,
    read=_read,
)
