"""Adapters read with suspicion, whichever tool wrote them: what they hold, where it lies, and that it fits together.

Everything that a file states is checked against what it holds before any of it is used. ``formats/`` knows one tool
a file.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dora_cli.checkpoints.adapter_format import CONFIG, METHOD, LowRank, Square, WeightDecomposed
from dora_cli.checkpoints.formats import FORMATS
from dora_cli.checkpoints.json_io import read_json, take
from dora_cli.checkpoints.manifest import verify_if_listed
from dora_cli.checkpoints.safetensors_io import FLOATS, Entry, read_header, read_tensor, require_finite
from dora_cli.checkpoints.token_rows import TokenUpdate
from dora_cli.errors import UserError
from dora_cli.registry import load

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.npz")

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
    flipped: bool = False  # whether the file holds Aᵀ and Bᵀ

    @property
    def rank(self) -> int:
        return self.a.shape[1 if self.flipped else 0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return (self.b.shape[1], self.a.shape[0]) if self.flipped else (self.b.shape[0], self.a.shape[1])


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
        method: ``method.json``; empty for others' files.
        prefix: the model's ``base_model_prefix``; null where it is not known, empty where the modules' names are
            those in the base's files.
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
    prefix: str | None = None

    @property
    def quantization(self) -> str | None:
        """How the base was packed that it was trained on, as our own runs note it."""
        found = self.method.get("quantization")
        return take(found, "kind", str, self.folder / METHOD) if isinstance(found, dict) else None


@dataclass(frozen=True)
class Contents:
    """What a tool's files say, before any tensor is read. The names are those of ``AdapterFile``."""

    kind: str
    modules: Mapping[str, Update | SquareUpdate]
    head: Mapping[str, Entry] = field(default_factory=dict)
    replaced: Mapping[str, Entry] = field(default_factory=dict)
    tokens: dict[str, TokenUpdate] = field(default_factory=dict)
    base_name: str | None = None
    revision: str | None = None
    task_type: str | None = None
    prefix: str | None = None


@dataclass(frozen=True)
class Format:
    """How one tool's adapters are told from others, and read.

    Attributes:
        title: the tool, for messages.
        weights: the file of its tensors.
        convert: the tool's own way from pickled weights to that file.
        knows: whether the settings in ``adapter_config.json`` are this tool's.
        read: what the settings and the tensors of the folder's files say. Raises a UserError for what is damaged, or
            would give another model than the tool's.
    """

    title: str
    weights: str
    convert: str
    knows: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any], dict[str, Entry], Path], Contents]


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter folder of any known tool, or the adapter of a run folder.

    Tensors are read when looked up: each look-up may raise a UserError for numbers that are not finite.

    Raises:
        UserError: there is no adapter, it is damaged (naming the file and what disagrees), its weights are pickled,
            or it is of a kind that is not read here.
    """
    folder = adapter_folder(Path(path))
    verify_if_listed(folder)
    config = read_json(folder / CONFIG)
    known = (load(FORMATS, name, key="format") for name in FORMATS)
    form = next(form for form in known if form.knows(config))
    if not (folder / form.weights).is_file() and any(next(folder.glob(p), None) for p in PICKLED):
        raise UserError(
            f"{folder} holds pickled weights, which can run any code and are not read",
            where=f"its {CONFIG} is {form.title}'s, which keeps others in {form.weights}",
            hint=form.convert,
        )
    found = form.read(config, read_header(folder / form.weights), folder / CONFIG)
    method = read_json(folder / METHOD) if (folder / METHOD).is_file() else {}
    noted = method.get("base_model_prefix")
    return AdapterFile(
        folder=folder,
        kind=found.kind,
        modules=Lazy(found.modules, read_update),
        head=Lazy(found.head, read_tensor),
        replaced=Lazy(found.replaced, read_tensor),
        base_name=found.base_name,
        revision=found.revision,
        task_type=found.task_type,
        method=method,
        tokens=found.tokens,
        prefix=noted if isinstance(noted, str) and noted else found.prefix,
    )


def adapter_folder(path: Path) -> Path:
    """The adapter folder that ``path`` is, or holds as a run does."""
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    if path.is_file():
        raise UserError(f"{path} is a file", hint=f"name the adapter's folder, which holds {CONFIG} too")
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    raise UserError(
        f"{path} holds no adapter",
        where=f"neither {CONFIG} nor adapter/{CONFIG} is there",
        hint="name a finished run or an adapter folder",
    )


def group(
    entries: Mapping[str, Entry], suffixes: Mapping[str, str], weights: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, Entry]]:
    """Split tensors into the parts of each module, by their names in ``Update``, and all others.

    Args:
        entries: name in the model → tensor.
        suffixes: how a part's name goes on after its module's → the part's name in ``Update``.
        weights: the file, for the message.

    Raises:
        UserError: a module lacks a part.
    """
    grouped: dict[str, dict[str, Any]] = {}
    rest: dict[str, Entry] = {}
    for name, entry in entries.items():
        suffix = next((suffix for suffix in suffixes if name.endswith(f".{suffix}")), None)
        if suffix:
            grouped.setdefault(name.removesuffix(f".{suffix}"), {})[suffixes[suffix]] = entry
        else:
            rest[name] = entry
    for name, parts in grouped.items():
        missing = [suffix for suffix, part in suffixes.items() if part not in parts]
        if missing:
            raise UserError(f"{weights} is damaged", where=f"'{name}' has no {missing[0]}")
    return grouped, rest


def check_update(update: Update, rank: int, file: Path) -> None:
    """Refuse tensors that do not make an update of this rank.

    Raises:
        UserError: naming the tensor and what disagrees.
    """
    a, b = update.a, update.b
    for entry in (a, b, update.e, update.magnitude):
        if entry:
            check_type(entry)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UserError(f"{a.file}: '{update.name}' is no linear layer", where=f"shapes {a.shape} and {b.shape}")
    ranks = update.rank, b.shape[0 if update.flipped else 1]
    if ranks != (rank, rank):
        raise UserError(
            f"{file.parent} is damaged",
            where=f"'{update.name}' has tensors of rank {ranks[0]} and {ranks[1]}, {CONFIG} says {rank}",
        )
    if update.e and update.e.shape != (rank, 1):
        raise UserError(f"{file.parent} is damaged", where=f"'{update.e.name}' has the shape {update.e.shape}")
    if update.magnitude and update.magnitude.shape != update.shape[:1]:
        raise UserError(
            f"{file.parent} is damaged", where=f"'{update.magnitude.name}' has the shape {update.magnitude.shape}"
        )


def check_type(entry: Entry) -> None:
    """Raise a UserError where a tensor holds no floating-point numbers."""
    if entry.dtype not in FLOATS:
        raise UserError(f"{entry.file}: '{entry.name}' has the type {entry.dtype}, expected one of {', '.join(FLOATS)}")


def read_update(update: Update | SquareUpdate) -> LowRank | Square:
    """The tensors of one module's update, float32, every scale folded in.

    Raises:
        UserError: they hold numbers that are not finite.
    """
    if isinstance(update, SquareUpdate):
        return Square(update.name, _float32(update.m), update.shape, update.transposed)
    a, b = _float32(update.a), _float32(update.b)
    if update.flipped:
        a, b = a.T.contiguous(), b.T.contiguous()
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
