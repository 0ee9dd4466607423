"""One tensor of a merged model, from file to file in blocks: read, change in float32, round once, write."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dora_cli.checkpoints.adapter_format import LowRank, Square, WeightDecomposed
from dora_cli.checkpoints.deltas import Deltas, delta_rows
from dora_cli.checkpoints.safetensors_io import (
    DTYPES,
    Entry,
    copy_bytes,
    descriptor,
    read_into,
    read_tensor,
    require_finite,
    write_from,
)
from dora_cli.checkpoints.token_rows import TokenUpdate
from dora_cli.errors import UserError

BLOCK = 1 << 18  # numbers per block: read, widened and written, it stays in a core's cache

Change = Callable[[Tensor, slice], Tensor]
Blocks = Callable[[Callable[[Tensor, slice], object]], None]  # calls it for every block of rows


@dataclass(frozen=True)
class Piece:
    """One tensor of the merged model.

    Attributes:
        name: its name there.
        source: where its numbers come from: the base, or the adapter for what was trained in full.
        dtype: the type to write.
        update: reads the update to add; null where there is none.
        checked: whether the numbers are looked at for NaN and infinity on the way.
        repacked: makes of the whole stored tensor the one that is added to, float32; null where it is the stored one.
        tokens: rows that take the place of the source's, or follow on them.
    """

    name: str
    source: Entry
    dtype: str
    update: Callable[[], LowRank | Square | Deltas] | None = None
    checked: bool = False
    repacked: Callable[[Tensor], Tensor] | None = None
    tokens: TokenUpdate | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is written."""
        if self.tokens is None:
            return self.source.shape
        return max(self.source.shape[0], 1 + max(self.tokens.ids)), *self.source.shape[1:]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def write_piece(piece: Piece, out: Path, start: int) -> None:
    """Write the bytes of one tensor into ``out`` from byte ``start`` on.

    Raises:
        UserError: what was computed, or is written in a narrower type than it had, is not finite there.
    """
    with descriptor(out, os.O_WRONLY) as target:
        if piece.update or piece.repacked or piece.checked or piece.dtype != piece.source.dtype:
            blocks = _blocks(piece)
            change = _merging(piece.source, blocks, piece.update()) if piece.update else lambda block, rows: block
            _stream(piece, blocks, change, target, start)
        else:
            copy_bytes(piece.source, target, start)
        if piece.tokens:
            _write_rows(piece.tokens, DTYPES[piece.dtype], target, start)


def _write_rows(tokens: TokenUpdate, dtype: torch.dtype, target: int, start: int) -> None:
    rows = read_tensor(tokens.rows)  # a few
    rounded = rows.to(dtype)
    _refuse_lost(rows, rounded, tokens.name)
    for number, row in zip(tokens.ids, rounded, strict=True):
        written = row.contiguous().view(torch.uint8).numpy()
        write_from(target, start + number * written.nbytes, memoryview(written))


def _blocks(piece: Piece) -> Blocks:
    """How to go over what is added to: a block of the file at a time, or of the whole that was made of it."""
    if piece.repacked is None:
        return partial(_for_blocks, piece.source)
    whole = piece.repacked(read_tensor(piece.source))

    def visit_all(visit: Callable[[Tensor, slice], object]) -> None:
        for rows in _row_blocks(piece.source):
            visit(whole[rows].clone(), rows)  # which may be written into

    return visit_all


def _stream(piece: Piece, blocks: Blocks, change: Change, target: int, start: int) -> None:
    dtype, stored = DTYPES[piece.dtype], DTYPES[piece.source.dtype]
    computed = piece.update is not None or piece.repacked is not None
    narrowed = dtype != stored and torch.finfo(dtype).max < torch.finfo(stored).max
    written = bytearray(_block_rows(piece.source) * _row_length(piece.source) * dtype.itemsize)
    place = torch.frombuffer(written, dtype=dtype) if written else torch.empty(0, dtype=dtype)

    def write(block: Tensor, rows: slice) -> None:
        if piece.checked:
            require_finite(block, piece.source)
        changed = change(block, rows)
        rounded = place[: changed.numel()].copy_(changed.view(-1))  # to nearest, once
        if (computed or narrowed) and not _are_finite(rounded):
            _refuse_lost(changed.reshape(-1), rounded, piece.name)
            if computed:
                raise UserError(
                    f"'{piece.name}' would hold numbers that are not finite",
                    hint="use smaller weights; without any, it is the base's or the adapter's that are too large",
                )
        begin = start + rows.start * _row_length(piece.source) * dtype.itemsize
        write_from(target, begin, memoryview(written)[: changed.numel() * dtype.itemsize])

    blocks(write)


def _are_finite(numbers: Tensor) -> bool:
    """By the smallest and the largest, where a NaN is both: a tenth of the time of looking at each."""
    return bool(torch.stack(torch.aminmax(numbers)).isfinite().all())


def _refuse_lost(numbers: Tensor, rounded: Tensor, name: str) -> None:
    """Refuse finite numbers that the type to write can't hold.

    Raises:
        UserError: naming the tensor and its largest number.
    """
    lost = numbers[numbers.isfinite() & ~rounded.isfinite()]
    if lost.numel():
        kind = str(rounded.dtype).removeprefix("torch.")
        raise UserError(
            f"'{name}' has numbers too large for {kind}",
            where=f"{float(lost.abs().max()):.5g}, and {kind} ends at {torch.finfo(rounded.dtype).max:.5g}",
            hint="use bfloat16, or smaller weights where adapters are combined",
        )


def _merging(source: Entry, blocks: Blocks, update: LowRank | Square | Deltas) -> Change:
    """How a block of rows of the stored weight becomes the merged one.

    The stored weight is W, shape ``(d_out, d_in)``, or its transpose; the added rows are those of B A, or of Aᵀ Bᵀ.
    The weight-decomposed one then scales each output's weights to the norm m: rows of W, or columns of its transpose.
    A square's ΔW is formed whole, for this one module.
    """
    if isinstance(update, Deltas):
        made = update.rows(list(_row_blocks(source)))  # which are asked for in this order, once
        return lambda block, rows: _wide(block) + next(made)
    if isinstance(update, Square):
        delta = delta_rows(update)
        return lambda block, rows: _wide(block) + delta(rows)
    left, right = (update.a.T.contiguous(), update.b.T.contiguous()) if update.transposed else (update.b, update.a)

    def added(block: Tensor, rows: slice) -> Tensor:
        wide = _wide(block)
        return wide.addmm_(left[rows].to(wide.dtype), right.to(wide.dtype))

    if not isinstance(update, WeightDecomposed):
        return added
    magnitude = update.magnitude

    def rescaled_rows(block: Tensor, rows: slice) -> Tensor:
        wide = added(block, rows)
        return wide.mul_(_ratio(magnitude[rows], torch.linalg.vector_norm(wide, dim=1))[:, None])

    if not update.transposed:
        return rescaled_rows
    squares = torch.zeros(source.shape[1], dtype=torch.float64)
    blocks(lambda block, rows: squares.add_(added(block, rows).double().square_().sum(0)))
    ratio = _ratio(magnitude, squares.sqrt())
    return lambda block, rows: added(block, rows).mul_(ratio)


def _wide(block: Tensor) -> Tensor:
    return block.to(torch.promote_types(block.dtype, torch.float32))


def _ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / n, and 0 for the weights of an output that are all 0: they have no direction to scale."""
    return torch.where(norms > 0, magnitude / norms, 0.0).float()


def _for_blocks(source: Entry, visit: Callable[[Tensor, slice], object]) -> None:
    """Call ``visit(block, rows)`` for every block of rows; the block is only valid until the call returns."""
    length, step = _row_length(source), _block_rows(source)
    row_bytes = length * DTYPES[source.dtype].itemsize
    buffer = bytearray(step * row_bytes)
    if not buffer:
        return
    whole = torch.frombuffer(buffer, dtype=DTYPES[source.dtype]).view(step, length)
    with descriptor(source.file) as file:
        for rows in _row_blocks(source):
            count = rows.stop - rows.start
            read_into(file, source.start + rows.start * row_bytes, memoryview(buffer)[: count * row_bytes], source.file)
            visit(whole[:count], rows)


def _row_blocks(source: Entry) -> Iterator[slice]:
    """The blocks of rows that a tensor is gone over in."""
    rows, step = _rows(source), _block_rows(source)
    for first in range(0, rows, max(1, step)):
        yield slice(first, min(first + step, rows))


def _rows(source: Entry) -> int:
    return source.shape[0] if len(source.shape) > 1 else prod(source.shape)


def _row_length(source: Entry) -> int:
    return prod(source.shape[1:])


def _block_rows(source: Entry) -> int:
    return min(_rows(source), max(1, BLOCK // max(1, _row_length(source))))
