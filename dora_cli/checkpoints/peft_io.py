"""Adapters read with suspicion: our own, and what PEFT wrote (LoRA and its kin, weight-decomposed, AdaLoRA).

Everything that a file states is checked against what it holds before any of it is used. Options that would change
the weights in a way not written here are refused by name, known or not: silence would give a wrong model.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dora_cli.checkpoints.adapter_format import (
    CONFIG,
    METHOD,
    PREFIX,
    SQUARE,
    WEIGHTS,
    LowRank,
    Square,
    WeightDecomposed,
)
from dora_cli.checkpoints.json_io import read_json, strings, take
from dora_cli.checkpoints.manifest import verify_if_listed
from dora_cli.checkpoints.safetensors_io import FLOATS, Entry, read_header, read_tensor, require_finite
from dora_cli.checkpoints.token_rows import KEY as TOKEN_KEY
from dora_cli.checkpoints.token_rows import TokenUpdate, take_tokens
from dora_cli.errors import UserError

Part = TypeVar("Part")
Value = TypeVar("Value", covariant=True)


class Lazy(Mapping[str, Value], Generic[Part, Value]):
    """A mapping whose values are read, checked and forgotten at each look-up, so that one costs no more than itself.

    ``parts`` says where each lies and how large it is, with nothing read; ``read`` makes a value of one.
    """

    def __init__(self, parts: Mapping[str, Part], read: Callable[[Part], Value]) -> None:
        self.parts = parts
        self.read = read

    def __getitem__(self, name: str) -> Value:
        return self.read(self.parts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class Update:
    """Where one module's update lies in the file: ΔW = scale · B diag(e) A."""

    name: str
    a: Entry  # (r, d_in)
    b: Entry  # (d_out, r)
    scale: float
    transposed: bool
    e: Entry | None = None  # (r, 1), AdaLoRA's
    magnitude: Entry | None = None  # (d_out,), the weight-decomposed one's

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class SquareUpdate:
    """Where one module's square lies in the file."""

    name: str
    m: Entry  # (side, side)
    shape: tuple[int, int]  # (d_out, d_in)
    transposed: bool

    @property
    def rank(self) -> int:
        return self.m.shape[0]


@dataclass
class AdapterFile:
    """An adapter folder, checked.

    Attributes:
        folder: the adapter folder itself, also where a run was named.
        kind: ``LORA``, ``ADALORA``, ``MORA`` or ``FULL``.
        modules: full module name → update, every scale folded in, float32; a ``Square`` in ``MORA``. Its
            ``transposed`` is what the file says, which for PEFT's files is one flag for all modules; the base's
            shapes decide in a merge.
        head: parameter name → tensor of what was trained in full; the base may lack it or hold another shape.
        replaced: parameter name → tensor that takes the place of a parameter of the base (``FULL``).
        tokens: full module name → where its rows of new tokens lie.
        method: ``method.json``; empty for PEFT's own files.
    """

    folder: Path
    kind: str
    modules: Lazy[Update | SquareUpdate, LowRank | Square]
    head: Lazy[Entry, Tensor]
    replaced: Lazy[Entry, Tensor]
    base_name: str | None
    revision: str | None
    task_type: str | None
    method: dict[str, Any]
    tokens: dict[str, TokenUpdate]

    @property
    def quantization(self) -> str | None:
        """How the base was packed that it was trained on, as our own runs note it."""
        found = self.method.get("quantization")
        return take(found, "kind", str, self.folder / METHOD) if isinstance(found, dict) else None


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter folder, or the adapter of a run folder.

    Tensors are read when looked up: each look-up may raise a UserError for numbers that are not finite.

    Raises:
        UserError: there is no adapter, it is damaged (naming the file and what disagrees), its weights are pickled,
            or it is of a kind that is not read here.
    """
    folder = adapter_folder(Path(path))
    verify_if_listed(folder)
    file = folder / CONFIG
    config = read_json(file)
    kind = take(config, "peft_type", str, file)
    if kind not in READERS:
        raise UserError(f"{folder} holds an adapter of type {kind}", hint=f"read are: {', '.join(READERS)}")
    if not (folder / WEIGHTS).is_file() and any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds pickled weights, which can run any code and are not read",
            hint="load it once with PEFT and save it again: save_pretrained writes safetensors",
        )
    entries = read_header(folder / WEIGHTS)
    tokens = take_tokens(config, entries, file)
    modules, head, replaced = READERS[kind](config, entries, file)
    return AdapterFile(
        folder=folder,
        kind=kind,
        modules=Lazy(modules, _read_update),
        head=Lazy(head, read_tensor),
        replaced=Lazy(replaced, read_tensor),
        base_name=take(config, "base_model_name_or_path", str, file, None),
        revision=take(config, "revision", str, file, None),
        task_type=take(config, "task_type", str, file, None),
        method=read_json(folder / METHOD) if (folder / METHOD).is_file() else {},
        tokens=tokens,
    )


def adapter_folder(path: Path) -> Path:
    """The adapter folder that ``path`` is, or holds as a run does."""
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    raise UserError(
        f"{path} holds no adapter",
        where=f"neither {CONFIG} nor adapter/{CONFIG} is there",
        hint="name a finished run or an adapter folder",
    )


Parts = tuple[Mapping[str, Update | SquareUpdate], dict[str, Entry], dict[str, Entry]]

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
    modules = {}
    for name, parts in grouped.items():
        rank = rank_of(name)
        scale = alpha_of(name) / (sqrt(rank) if root else rank)
        modules[name] = Update(name=name, scale=scale, transposed=flag, **parts)
        _check_update(modules[name], rank, file)
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
    modules = {}
    for name, parts in grouped.items():
        kept = pattern.get(f"{name}.lora_E", [True] * start)
        if not isinstance(kept, list) or len(kept) != start or not all(isinstance(k, bool) for k in kept):
            raise UserError(f"{file} is damaged", where=f"rank_pattern of '{name}' should be {start} booleans")
        modules[name] = Update(name=name, scale=alpha / (start + 1e-5), transposed=flag, **parts)
        _check_update(modules[name], sum(kept), file)
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
    modules = {}
    for name, parts in grouped.items():
        sizes = take(table, name, dict, file)
        side, d_out, d_in = (take(sizes, key, int, file) for key in ("side", "d_out", "d_in"))
        if side < 2 or side % 2 or d_out < 1 or d_in < 1:
            raise UserError(f"{file} is damaged", where=f"'{name}' has the side {side} and the shape {d_out}×{d_in}")
        m = parts["m"]
        _check_type(m)
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
) -> tuple[dict[str, dict[str, Entry]], dict[str, Entry]]:
    """Split the tensors into the parts of each module and whole parameters (heads, biases, embeddings)."""
    grouped: dict[str, dict[str, Entry]] = {}
    rest: dict[str, Entry] = {}
    for key, entry in entries.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise UserError(f"{entry.file}: '{key}' does not begin with '{PREFIX}' as PEFT's names do")
        suffix = next((suffix for suffix in suffixes if name.endswith(f".{suffix}")), None)
        if suffix:
            grouped.setdefault(name.removesuffix(f".{suffix}"), {})[suffixes[suffix]] = entry
        elif ".lora_" in name:
            raise UserError(f"{entry.file}: '{key}' is a part of LoRA that is not read here")
        elif not any(wrapper in name for wrapper in (".original_module.", ".modules_to_save.")):
            # with bias=all PEFT saves the biases inside a head's wrapper beside the head itself
            rest[name.replace(".base_layer.", ".")] = entry
    for name, parts in grouped.items():
        missing = [suffix for suffix, part in suffixes.items() if part not in parts]
        if missing:
            raise UserError(f"{file.with_name(WEIGHTS)} is damaged", where=f"'{name}' has no {missing[0]}")
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


def _check_update(update: Update, rank: int, file: Path) -> None:
    a, b = update.a, update.b
    for entry in (a, b, update.e, update.magnitude):
        if entry:
            _check_type(entry)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UserError(f"{a.file}: '{update.name}' is no linear layer", where=f"shapes {a.shape} and {b.shape}")
    if not a.shape[0] == b.shape[1] == rank:
        raise UserError(
            f"{file.parent} is damaged",
            where=f"'{update.name}' has tensors of rank {a.shape[0]} and {b.shape[1]}, {CONFIG} says {rank}",
        )
    if update.e and update.e.shape != (rank, 1):
        raise UserError(f"{file.parent} is damaged", where=f"'{update.e.name}' has the shape {update.e.shape}")
    if update.magnitude and update.magnitude.shape != b.shape[:1]:
        raise UserError(
            f"{file.parent} is damaged", where=f"'{update.magnitude.name}' has the shape {update.magnitude.shape}"
        )


def _check_type(entry: Entry) -> None:
    if entry.dtype not in FLOATS:
        raise UserError(f"{entry.file}: '{entry.name}' has the type {entry.dtype}, expected one of {', '.join(FLOATS)}")


def _read_update(update: Update | SquareUpdate) -> LowRank | Square:
    if isinstance(update, SquareUpdate):
        return Square(update.name, _float32(update.m), update.shape, update.transposed)
    a, b = _float32(update.a), _float32(update.b)
    if update.e:
        a = a * _float32(update.e)
    b = b * update.scale if update.scale != 1 else b
    require_finite(a, update.a)
    require_finite(b, update.b)
    if update.magnitude:
        return WeightDecomposed(update.name, a, b, update.transposed, magnitude=_float32(update.magnitude))
    return LowRank(update.name, a, b, update.transposed)


def _float32(entry: Entry) -> Tensor:
    """Finite in its own type and in this one: a float64 may be too large for it."""
    tensor = read_tensor(entry)
    if tensor.dtype != torch.float64:
        return tensor.float()
    require_finite(tensor.float(), entry)
    return tensor.float()
