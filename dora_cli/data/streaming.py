"""Training batches of a set that is read in order: a buffer of rows at a time, shuffled within it."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dora_cli.data.batching import LengthGroupedBatches, batches, dealt, has_share
from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import Rows
from dora_cli.data.token_rows import NothingToLearnError
from dora_cli.errors import UserError
from dora_cli.processes import ALONE, World


@dataclass(frozen=True)
class Block:
    """Training rows in memory, and their tokens: all of them, or a buffer of those that are streamed.

    ``first``: the number in its source of the first row.
    """

    rows: Rows
    encoded: Encoded
    first: int = 0

    def number(self, row: int) -> int:
        """The number in the source (of a split that is read as a whole: in the split) of an encoded row."""
        return self.first + self.encoded.place(row)

    def where(self, row: int) -> str:
        """Where an encoded row stands in its source, in words."""
        return self.rows.where("train", self.encoded.place(row))


class BatchStream:
    """Endless training batches. A buffer is filled, emptied in batches as if it were a data set of its own, and filled
    again. So its order follows from the seed and its number, and a position is three numbers: the buffer's, that of
    its first row, and how many of its batches are taken. Nothing of a buffer need be kept to go on exactly.

    Args:
        rows: with a stream.
        encode: checks and tokenises the ``train`` of such rows.
        batch_size: rows of a batch.
        seed: of the order.
        remember: how many of the last batches :meth:`rows_of` knows.
        world: all processes read all rows, and each takes its share of every batch.
    """

    def __init__(
        self,
        rows: Rows,
        encode: Callable[[Rows], Encoded],
        *,
        batch_size: int,
        seed: int,
        remember: int,
        world: World = ALONE,
    ) -> None:
        assert rows.stream is not None
        self.rows, self.source, self.encode = rows, rows.stream, encode
        self.batch_size, self.seed, self.world = batch_size, seed, world
        self.buffer, self.row, self.taken = 0, self.source.first, 0
        self.count = 0  # batches taken in all
        self.recent: deque[tuple[int, Block, list[int]]] = deque(maxlen=remember)
        self._digest: str | None = None  # of the buffer that a checkpoint was written in, until it has been compared
        self._current: Encoded | None = None

    def batches(self, *, pin: bool = False) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """This process's share of every batch from the position on, which moves with each; and whether it is one, or a
        row that is to count for nothing.

        Raises:
            UserError: a row that can't be used, or can't be read, when its buffer is filled.
        """
        while True:
            for split in self.source.blocks(self.row):
                yield from self._of_one(split, pin)
                self.buffer, self.row, self.taken = self.buffer + 1, self.row + len(split), 0
            self.row = self.source.first

    def _of_one(self, split: Any, pin: bool) -> Iterator[tuple[dict[str, Tensor], bool]]:
        rows = replace(self.rows, splits={"train": split})
        try:
            block = Block(rows, self.encode(rows), self.row)
        except NothingToLearnError:
            return
        self._current = block.encoded
        self._compare(block.encoded)
        plan = LengthGroupedBatches(block.encoded.lengths, self.batch_size, self.seed)
        left = plan.epoch(self.buffer)[self.taken :]
        mine = batches(block.encoded, dealt(left, self.world), pin=pin)
        for numbers, batch in zip(left, mine, strict=True):
            self.recent.append((self.count, block, numbers))
            self.taken, self.count = self.taken + 1, self.count + 1
            yield batch, has_share(numbers, self.world)

    def rows_of(self, first: int, last: int) -> list[tuple[Block, int]]:
        """The rows of the batches with these numbers, counted from 0 over the whole run."""
        return [(block, row) for i, block, rows in self.recent if first <= i < last for row in rows]

    def state(self) -> dict[str, Any]:
        """The position, for JSON, with a digest of the buffer that it lies in."""
        digest = self._current.fingerprint() if self._current is not None else None
        return {"buffer": self.buffer, "row": self.row, "taken": self.taken, "count": self.count, "digest": digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a position; the buffer is compared when it has been filled again."""
        self.buffer, self.row, self.taken, self.count = (state[key] for key in ("buffer", "row", "taken", "count"))
        self._digest = state["digest"]

    def _compare(self, encoded: Encoded) -> None:
        digest, self._digest = self._digest, None
        if digest is not None and digest != encoded.fingerprint():
            raise UserError(
                "resume=true: the training data is not the interrupted run's",
                where=f"the rows from number {self.row + 1:,} on have other tokens or labels",
                hint="put the data (and the tokenizer) back as they were, or start anew in another out=DIR",
            )
