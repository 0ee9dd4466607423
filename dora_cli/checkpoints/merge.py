"""Merging an adapter, or several, into the base, from file to file: no model is built, and memory holds a few blocks.

What the adapter does not touch is copied as bytes. Target weights are read, changed and written by blocks of rows,
ΔW added in float32 and rounded once. Heads are written as trained.
"""

import errno
import glob
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import torch

from dora_cli.checkpoints.adapter_file import AdapterFile, read_adapter
from dora_cli.checkpoints.atomic import atomic_folder, atomic_write_text, require_new_folder, sweep
from dora_cli.checkpoints.base_folder import CONFIG, INDEX, SINGLE, copy_small_files, open_base, resolve_base
from dora_cli.checkpoints.combine import combination, combined, leading
from dora_cli.checkpoints.deltas import Combination
from dora_cli.checkpoints.manifest import verify_if_listed, write_manifest
from dora_cli.checkpoints.merge_plan import plan_merge
from dora_cli.checkpoints.merged_config import DTYPE_NAMES, merged_config, require_family
from dora_cli.checkpoints.packed_base import ORIGINAL, packed_base
from dora_cli.checkpoints.safetensors_io import DTYPES, write_header
from dora_cli.checkpoints.weights import Piece, write_piece
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean

OUTPUT_DTYPES = {"auto": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# beside a model that was made of several adapters, or trained on other weights than the base stores
MADE_OF = "merge.json"
CARD = "README.md"
WORKERS = 4  # one thread each; more than this only waits for memory


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        kind: the adapter's type, as in its ``peft_type``.
        ranks: adapted module → rank that was added, 0 included; the square's side for ``MORA``.
        head: parameters that were trained in full and written as they are.
        tokens: how many tokens got embeddings of their own.
        left_out: tensors of the base that the merged model's class does not have.
        bytes: of all written tensors.
        quantization: how the base was packed in training; null where it was not.
        base_weights: which were added to, ``original`` or ``dequantised``.
        dtypes: of the written weights, by torch's names.
        base_name: the base as it was named.
        adapters: the adapters, one or several.
        owner: the one among them that head, tokens and task are of.
        combination: how several were combined; null for one as it is.
    """

    out: Path
    base: Path
    kind: str
    ranks: dict[str, int]
    head: list[str]
    tokens: int
    left_out: list[str]
    bytes: int
    shards: int
    seconds: float
    quantization: str | None = None
    base_weights: str = ORIGINAL
    dtypes: tuple[str, ...] = ()
    base_name: str = ""
    adapters: tuple[Path, ...] = ()
    owner: Path = Path()
    combination: Combination | None = None


def merge(
    checkpoint: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: str = "auto",
    shard_size: str | int = "5GB",
    replace: bool = False,
    base_weights: str = ORIGINAL,
    combine: str | None = None,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int | None = None,
    heads_from: str | None = None,
    card: Callable[[MergeReport], str] | None = None,
) -> MergeReport:
    """Write the model that an adapter, or several, make of their base as a transformers folder.

    The folder appears whole: an interrupted merge leaves nothing under ``out``.

    Args:
        checkpoint: a run folder or an adapter folder (ours, PEFT's or another tool's); several make one model.
        out: the folder to make; it may be there if it is empty.
        base: name or folder of the base; null takes the one the adapter names.
        dtype: type of all floating-point weights; ``auto`` keeps each tensor's.
        shard_size: largest size of one file, such as ``5GB`` (10⁹) or ``512MiB``.
        base_weights: of a run on a quantised base, what is added to: the ``original`` weights as they are stored, or
            the ``dequantised`` ones that the run was trained with.
        replace: whether a folder that holds something gives way to the new one, in one step.
        combine: how several adapters become one (``deltas.WAYS``); needed where there are several.
        weights: one for each of them; null: 1 each.
        density: the share of an update's elements that TIES and DARE keep; null: 0.5.
        seed: of DARE's choice of elements; null: 1.
        heads_from: the one of ``checkpoint`` whose head and tokens the model gets, where several have some.
        card: gives the text of its README.md, which may be edited: it is in no manifest.

    Raises:
        UserError: an argument or a file is wrong, ``out`` holds something, or the adapter does not fit the base.
        OSError: the disk has no room for it.
    """
    begin = time.perf_counter()
    out = Path(out)
    if dtype not in OUTPUT_DTYPES:
        raise UserError(f"unknown dtype '{dtype}'", hint=did_you_mean(dtype, OUTPUT_DTYPES))
    limit = parse_size(shard_size)
    if not (replace and out.is_dir()):
        require_new_folder(out)
    names = [os.fspath(c) for c in ([checkpoint] if isinstance(checkpoint, (str, os.PathLike)) else checkpoint)]
    adapters = [read_adapter(Path(name)) for name in names]
    adapter, chosen = adapters[0], None
    if len(names) > 1 or any(option is not None for option in (combine, weights, density, seed, heads_from)):
        chosen = combination(combine, weights, density, seed, len(names))
        adapter = leading(adapters, names, base=base, heads_from=heads_from)
    packed = packed_base(adapter, base_weights)
    name = base or adapter.base_name
    if not name:
        raise UserError(f"{adapter.folder} does not say which model it was trained on", hint="set base=")
    base_folder = resolve_base(name, None if base else adapter.revision)
    verify_if_listed(base_folder)
    model = open_base(base_folder)
    for each in adapters:
        require_family(each, model)
    if chosen:
        adapter = combined(adapters, adapter, chosen, model)

    pieces, left_out = plan_merge(adapter, model, OUTPUT_DTYPES[dtype], packed)
    head_shapes = {name: entry.shape for name, entry in adapter.head.parts.items()}
    config = merged_config(adapter, model, OUTPUT_DTYPES[dtype] or model.dtype, head_shapes)
    if adapter.tokens:
        config["vocab_size"] = max(piece.shape[0] for piece in pieces if piece.tokens)
    shards = _shards(pieces, limit)
    total = sum(piece.nbytes for piece in pieces)
    _require_space(out, total)
    report = MergeReport(
        out=out,
        base=model.folder,
        kind=adapter.kind,
        ranks={update.name: update.rank for update in adapter.modules.parts.values()},
        head=sorted([*adapter.head, *adapter.replaced]),
        tokens=max((len(rows.ids) for rows in adapter.tokens.values()), default=0),
        left_out=left_out,
        bytes=total,
        shards=len(shards),
        seconds=0.0,
        quantization=adapter.quantization,
        base_weights=base_weights,
        dtypes=tuple(sorted({DTYPE_NAMES[piece.dtype] for piece in pieces if piece.dtype in DTYPE_NAMES})),
        base_name=name,
        adapters=tuple(each.folder for each in adapters),
        owner=adapter.folder,
        combination=chosen,
    )
    with atomic_folder(out, replace=replace) as folder:
        _write_shards(folder, shards, total)
        atomic_write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        copy_small_files(model.folder, folder)
        copy_small_files(adapter.folder, folder)  # a tokenizer that was saved with the adapter is the newer one
        if made_of := _made_of(adapter, base_weights, model.folder, names, chosen):
            atomic_write_text(folder / MADE_OF, json.dumps(made_of, indent=2) + "\n")
        write_manifest(folder)
        if card is not None:
            atomic_write_text(folder / CARD, card(report))
    return replaced(report, seconds=time.perf_counter() - begin)


def _made_of(
    adapter: AdapterFile, base_weights: str, base: Path, names: list[str], chosen: Combination | None
) -> dict[str, Any]:
    """What the files of the merged model do not say themselves."""
    made_of: dict[str, Any] = {}
    if adapter.quantization:
        made_of = {"quantization": adapter.quantization, "base_weights": base_weights, "base": str(base)}
    if chosen:
        made_of |= {"adapters": names, **asdict(chosen)}
    return made_of


def parse_size(text: str | int) -> int:
    """Bytes of ``5GB``, ``512MiB`` or a plain number.

    Raises:
        UserError: not a size, or 0.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)", str(text).strip())
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match and match[2].upper() in UNITS else 0
    if size < 1:
        raise UserError(f"shard_size={text} is no size", hint="such as 5GB, 512MiB or a number of bytes")
    return size


def _shards(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    """The pieces in files of at most ``limit`` bytes (one piece at least), in their order."""
    shards: list[list[Piece]] = [[]]
    room = limit
    for piece in pieces:
        if shards[-1] and piece.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(piece)
        room -= piece.nbytes
    return shards


def _write_shards(folder: Path, shards: list[list[Piece]], total: int) -> None:
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    places = []
    for name, pieces in zip(names, shards, strict=True):
        # wider types first, so that every tensor lies aligned to its type
        pieces = sorted(pieces, key=lambda piece: -DTYPES[piece.dtype].itemsize)
        starts = write_header(folder / name, ((piece.name, piece.dtype, piece.shape) for piece in pieces))
        places += [(piece, folder / name, starts[piece.name]) for piece in pieces]
    with _one_thread_each() as workers:
        for done in [workers.submit(write_piece, *place) for place in places]:
            done.result()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {piece.name: file.name for piece, file, _ in sorted(places, key=lambda place: place[0].name)},
        }
        atomic_write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


@contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Threads that each read, compute and write; the first failure stops those that have not begun.

    Blocks are too small to share: torch's own threads would wait for each other after every operation.
    """
    threads = torch.get_num_threads()
    workers = ThreadPoolExecutor(min(WORKERS, threads))
    torch.set_num_threads(1)
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _require_space(out: Path, needed: int) -> None:
    out = out.resolve()
    sweep(out.parent, glob.escape(out.name))  # what a killed merge has left takes as much
    there = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        scale, unit = (1e9, "GB") if needed >= 1e8 else (1e6, "MB")
        message = f"no space left: the merged model takes {needed / scale:,.2f} {unit}, {free / scale:,.2f} are free"
        raise OSError(errno.ENOSPC, message, str(there))
