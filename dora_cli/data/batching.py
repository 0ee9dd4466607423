"""Which rows form a batch: plans without state, so that any epoch can be entered anywhere."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dora_cli.data.encoded import Encoded
from dora_cli.processes import World

MEGABATCH = 50  # batches whose rows are sorted together: padding shrinks, the order stays random at large


@dataclass(frozen=True)
class LengthGroupedBatches:
    """Training batches of rows of similar length.

    ``epoch(e)`` is a function of the seed and ``e`` alone: every row once, in batches of ``batch_size`` (one may be
    shorter), the batch with the longest row first, so that memory runs out at once or never.

    Attributes:
        lengths: tokens of every row, shape ``(N,)``.
        batch_size: rows per batch.
        seed: of the order.
    """

    lengths: Tensor
    batch_size: int
    seed: int

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """The row numbers of every batch of an epoch (counted from 0)."""
        return list(self._from(epoch, 0))

    def stream(self, first: int) -> Iterator[list[int]]:
        """The row numbers of every batch from the ``first``-th of a run on, epoch after epoch, without end."""
        epoch, skip = divmod(first, len(self))
        while True:
            yield from self._from(epoch, skip)
            epoch, skip = epoch + 1, 0

    def _from(self, epoch: int, first: int) -> Iterator[list[int]]:
        """The batches of an epoch from the ``first``-th on; 16 bytes a row are held meanwhile."""
        generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
        order = torch.randperm(len(self.lengths), generator=generator)
        for mega in order.split(MEGABATCH * self.batch_size):
            mega.copy_(mega[self.lengths[mega].argsort(descending=True, stable=True)])
        starts = torch.randperm(len(self), generator=generator) * self.batch_size
        longest = self.lengths[order[starts]]  # a batch starts with its longest row
        first_longest = int((longest == longest.max()).nonzero()[0])
        starts[[0, first_longest]] = starts[[first_longest, 0]]
        for start in starts[first:].tolist():
            yield order[start : start + self.batch_size].tolist()


def sequential_batches(lengths: Tensor, batch_size: int) -> list[list[int]]:
    """Evaluation batches: rows from long to short, so that little is padded; the same for every call."""
    return [batch.tolist() for batch in lengths.argsort(descending=True, stable=True).split(batch_size)]


def dealt(plan: Iterable[list[int]], world: World) -> Iterator[list[int]]:
    """This process's rows of each batch. Of a batch that has none for it, the first: see ``has_share``."""
    for rows in plan:
        yield list(world.share(rows)) or rows[:1]


def has_share(rows: Sequence[int], world: World) -> bool:
    """Whether a process has rows of its own in a batch. If not it goes along all the same and counts for nothing, for
    all have to take part where the base is sharded."""
    return len(rows) > world.rank


def batches(
    dataset: Encoded, plan: Iterable[list[int]], *, workers: int = 0, pin: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The batches of a plan, in its order, without touching the global random state.

    Args:
        dataset: the rows.
        plan: row numbers of every batch; it may be endless.
        workers: processes that put batches together ahead; 0 for none. They start once, and end with the iterator.
        pin: put batches into page-locked memory, for copies to a GPU that do not wait.
    """
    yield from DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=plan,
        collate_fn=_as_it_is,  # the data set gives whole batches
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_leave_interrupts if workers else None,
        # The loader draws a seed for its workers, from the global state if it has no generator of its own.
        generator=torch.Generator().manual_seed(0),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, a scheduler's signal every process of a job; what to do about it is
    the main one's business. Workers end when it does."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _mixed(seed: int, epoch: int) -> int:
    """One seed of two numbers; torch's generator reads only its low 32 bits, so they are hashed, not concatenated."""
    return int.from_bytes(sha256(f"{seed} {epoch}".encode()).digest()[:4])
