"""PEFT's adapters: LoRA and its kin, weight-decomposed, AdaLoRA; and what our own runs write in its layout.

Options that would change the weights in a way not written here are refused by name, known or not: silence would give
a wrong model. Fine-tuning tools that hand on PEFT's layout (TRL, axolotl, LLaMA-Factory, unsloth, torchtune) are read
by this file.
"""

import re
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

from dora_cli.checkpoints.adapter_file import Contents, Format, SquareUpdate, Update, check_type, check_update, group
from dora_cli.checkpoints.adapter_format import CONFIG, PREFIX, SQUARE, WEIGHTS
from dora_cli.checkpoints.json_io import strings, take
from dora_cli.checkpoints.safetensors_io import Entry
from dora_cli.checkpoints.token_rows import KEY as TOKEN_KEY
from dora_cli.checkpoints.token_rows import take_tokens
from dora_cli.errors import UserError

Parts = tuple[dict[str, Update | SquareUpdate], dict[str, Entry], dict[str, Entry]]

COMMON = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "bias", "modules_to_save", "init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "use_rslora", "use_dora", "loftq_config", "eva_config", "lora_ga_config", "megatron_config", "megatron_core",
    "qalora_group_size", "runtime_config", TOKEN_KEY,
}  # fmt: skip
ADALORA = {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def _read_lora(config: dict[str, Any], entries: dict[str, Entry], file: Path) -> Parts:
    """PEFT's LoRA: scale alpha / r (alpha / √r with rsLoRA), both by the first pattern that matches the name."""
    _refuse_unknown(config, COMMON, file)
    if config.get("init_lora_weights") not in HARMLESS_INIT:
        raise UserError(
            f"{file}: init_lora_weights={config['init_lora_weights']} changed the base's weights before training",
            hint="convert it with PEFT first: save_pretrained(path_initial_model_for_weight_conversion=…)",
        )
    suffixes = {"lora_A.weight": "a", "lora_B.weight": "b"}
    if take(config, "use_dora", bool, file, False):
        suffixes["lora_magnitude_vector"] = "magnitude"
    grouped, rest = _group(entries, suffixes, file)
    rank_of = _Pattern(config, "rank_pattern", "r", int, file)
    alpha_of = _Pattern(config, "alpha_pattern", "lora_alpha", (int, float), file)
    root = take(config, "use_rslora", bool, file, False)
    flag = take(config, "fan_in_fan_out", bool, file, False)
    modules: dict[str, Update | SquareUpdate] = {}
    for name, parts in grouped.items():
        rank = rank_of(name)
        scale = alpha_of(name) / (sqrt(rank) if root else rank)
        modules[name] = update = Update(name=name, scale=scale, transposed=flag, **parts)
        check_update(update, rank, file)
    return modules, rest, {}


def _read_adalora(config: dict[str, Any], entries: dict[str, Entry], file: Path) -> Parts:
    """PEFT's AdaLoRA: ΔW = B diag(E) A · alpha / (init_r + 1e-5); its ranknum stays init_r when ranks shrink.

    ``rank_pattern`` is a list of booleans per module; the saved tensors hold only the rows that are true.
    """
    _refuse_unknown(config, COMMON | ADALORA, file)
    grouped, rest = _group(entries, {"lora_A": "a", "lora_B": "b", "lora_E": "e"}, file)
    start = take(config, "init_r", int, file, 12)
    alpha = take(config, "lora_alpha", (int, float), file, 8)
    if start < 1 or alpha <= 0:
        raise UserError(f"{file} is damaged", where=f"init_r={start} and lora_alpha={alpha} should be above 0")
    flag = take(config, "fan_in_fan_out", bool, file, False)
    pattern = take(config, "rank_pattern", dict, file, {})
    modules: dict[str, Update | SquareUpdate] = {}
    for name, parts in grouped.items():
        kept = pattern.get(f"{name}.lora_E", [True] * start)
        if not isinstance(kept, list) or len(kept) != start or not all(isinstance(k, bool) for k in kept):
            raise UserError(f"{file} is damaged", where=f"rank_pattern of '{name}' should be {start} booleans")
        modules[name] = update = Update(name=name, scale=alpha / (start + 1e-5), transposed=flag, **parts)
        check_update(update, sum(kept), file)
    return modules, rest, {}


def _read_mora(config: dict[str, Any], entries: dict[str, Entry], file: Path) -> Parts:
    """Our own type: one square per module, over rotated blocks; ``modules`` says each one's side and shape."""
    if (kind := take(config, "kind", str, file)) != "rotation":
        raise UserError(f"{file}: kind={kind} is not read here", hint="read is: rotation (sharing is a LORA)")
    grouped, rest = _group(entries, {SQUARE: "m"}, file)
    flag = take(config, "fan_in_fan_out", bool, file, False)
    table = take(config, "modules", dict, file)
    if odd := sorted(table.keys() ^ grouped.keys()):
        raise UserError(f"{file.parent} is damaged", where=f"'{odd[0]}' is in only one of {CONFIG} and {WEIGHTS}")
    modules: dict[str, Update | SquareUpdate] = {}
    for name, parts in grouped.items():
        sizes = take(table, name, dict, file)
        side, d_out, d_in = (take(sizes, key, int, file) for key in ("side", "d_out", "d_in"))
        if side < 2 or side % 2 or d_out < 1 or d_in < 1:
            raise UserError(f"{file} is damaged", where=f"'{name}' has the side {side} and the shape {d_out}×{d_in}")
        m = parts["m"]
        check_type(m)
        if m.shape != (side, side):
            raise UserError(
                f"{file.parent} is damaged", where=f"'{m.name}' has the shape {m.shape}, {CONFIG} says {side}×{side}"
            )
        modules[name] = SquareUpdate(name, m, (d_out, d_in), flag)
    return modules, rest, {}


def _read_full(config: dict[str, Any], entries: dict[str, Entry], file: Path) -> Parts:
    """Our own type: whole parameters under their own names; those of ``modules_to_save`` are the head."""
    owners = tuple(f"{name}." for name in strings(config, "modules_to_save", file))
    head = {name: entry for name, entry in entries.items() if name.startswith(owners)}
    return {}, head, {name: entry for name, entry in entries.items() if name not in head}


READERS: dict[str, Callable[[dict[str, Any], dict[str, Entry], Path], Parts]] = {
    "LORA": _read_lora,
    "ADALORA": _read_adalora,
    "MORA": _read_mora,
    "FULL": _read_full,
}


def _refuse_unknown(config: dict[str, Any], known: set[str], file: Path) -> None:
    for key, value in config.items():
        if value and key not in known:
            raise UserError(f"{file} sets {key}, which is not read here", hint="merge this adapter with PEFT itself")


def _group(
    entries: dict[str, Entry], suffixes: dict[str, str], file: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, Entry]]:
    """Split the tensors into the parts of each module and whole parameters (heads, biases, embeddings)."""
    for key, entry in entries.items():
        if not key.startswith(PREFIX):
            raise UserError(f"{entry.file}: '{key}' does not begin with '{PREFIX}' as PEFT's names do")
    inner = {key.removeprefix(PREFIX): entry for key, entry in entries.items()}
    grouped, others = group(inner, suffixes, file.with_name(WEIGHTS))
    rest: dict[str, Entry] = {}
    for name, entry in others.items():
        if ".lora_" in name:
            raise UserError(f"{entry.file}: '{entry.name}' is a part of LoRA that is not read here")
        if not any(wrapper in name for wrapper in (".original_module.", ".modules_to_save.")):
            # with bias=all PEFT saves the biases inside a head's wrapper beside the head itself
            rest[name.replace(".base_layer.", ".")] = entry
    return grouped, rest


class _Pattern:
    """A number per module: the first pattern that matches its name as ``(.*\\.)?(pattern)$``, else the default."""

    def __init__(self, config: dict[str, Any], key: str, default: str, kinds: Any, file: Path) -> None:
        self.default = self._positive(take(config, default, kinds, file, 8), default, file)
        self.table = []
        table = take(config, key, dict, file, {})
        for pattern in table:
            try:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, RecursionError, OverflowError):
                raise UserError(f"{file} is damaged", where=f"{key}: '{pattern}' is no pattern") from None
            self.table.append((compiled, self._positive(take(table, pattern, kinds, file), f"{key} {pattern}", file)))

    @staticmethod
    def _positive(value: Any, key: str, file: Path) -> Any:
        if not 0 < value < 1e9:
            raise UserError(f"{file} is damaged", where=f"{key} is {value}")
        return value

    def __call__(self, name: str) -> Any:
        return next((value for pattern, value in self.table if pattern.match(name)), self.default)


def _read(config: dict[str, Any], entries: dict[str, Entry], file: Path) -> Contents:
    kind = take(config, "peft_type", str, file)
    if kind not in READERS:
        raise UserError(f"{file.parent} holds an adapter of type {kind}", hint=f"read are: {', '.join(READERS)}")
    tokens = take_tokens(config, entries, file)
    modules, head, replaced = READERS[kind](config, entries, file)
    return Contents(
        kind=kind,
        modules=modules,
        head=head,
        replaced=replaced,
        tokens=tokens,
        base_name=take(config, "base_model_name_or_path", str, file, None),
        revision=take(config, "revision", str, file, None),
        task_type=take(config, "task_type", str, file, None),
    )


PEFT = Format(
    title="PEFT",
    weights=WEIGHTS,
    convert="load it once with PEFT and save it again: save_pretrained writes safetensors",
    knows=lambda config: True,  # the last to be asked
    read=_read,
)
