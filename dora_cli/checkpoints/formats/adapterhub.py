"""LoRA as AdapterHub's ``adapters`` saves it (``save_adapter(…, use_safetensors=True)``).

``adapter.safetensors`` holds ``MODULE.loras.NAME.lora_A`` (r, d_in) and ``….lora_B`` (d_out, r); ΔW = alpha / r · B A.
Heads lie in folders of their own, in classes of that library's, and are not read.
"""

import re
from pathlib import Path
from typing import Any

from dora_cli.checkpoints.adapter_file import Contents, Format, Update, check_update, group
from dora_cli.checkpoints.json_io import take
from dora_cli.checkpoints.safetensors_io import Entry
from dora_cli.errors import UserError

WEIGHTS = "adapter.safetensors"


def _read(config: dict[str, Any], entries: dict[str, Entry], file: Path) -> Contents:
    settings = take(config, "config", dict, file)
    kind = take(settings, "architecture", str, file, "bottleneck")
    mode = take(settings, "composition_mode", str, file, "add")
    if kind != "lora" or mode != "add" or settings.get("use_gating"):
        what = f"architecture {kind}" if kind != "lora" else "gates" if mode == "add" else f"composition_mode {mode}"
        raise UserError(
            f"{file.parent} holds an adapter of AdapterHub's with {what}", hint="read is plain LoRA without gates"
        )
    rank, alpha = take(settings, "r", int, file), take(settings, "alpha", (int, float), file)
    if rank < 1 or not 0 < alpha < 1e9:
        raise UserError(f"{file} is damaged", where=f"r is {rank} and alpha is {alpha}")
    scale = 1.0 if _ignored_alpha(config) else alpha / rank
    name = take(config, "name", str, file)
    weights = file.with_name(WEIGHTS)
    grouped, rest = group(entries, {f"loras.{name}.lora_A": "a", f"loras.{name}.lora_B": "b"}, weights)
    if rest:
        raise UserError(f"{weights}: '{min(rest)}' is no part of an adapter that is read here")
    modules = {}
    for module, parts in grouped.items():
        modules[module] = Update(name=module, scale=scale, transposed=False, **parts)
        if parts["a"].shape[:1] != parts["b"].shape[1:]:
            raise UserError(f"{weights}: '{module}' is an attention layer in one piece, which is not read here")
        check_update(modules[module], rank, file)
    return Contents(kind="LORA", modules=modules, base_name=take(config, "model_name", str, file, None))


def _ignored_alpha(config: dict[str, Any]) -> bool:
    """Whether it was trained by a version of ``adapters`` before 1.1, which multiplied by 1 whatever alpha said."""
    version = re.match(r"adapters\.(\d+)\.(\d+)", str(config.get("version")))
    return version is not None and (int(version[1]), int(version[2])) < (1, 1)


ADAPTERHUB = Format(
    title="AdapterHub",
    weights=WEIGHTS,
    convert="load it once with adapters, and save it with save_adapter(FOLDER, NAME, use_safetensors=True)",
    knows=lambda config: isinstance(config.get("config"), dict) and "peft_type" not in config,
    read=_read,
)
