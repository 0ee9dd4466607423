"""The processes of one run, where torchrun has started several: who each is, and what they tell each other.

Every process builds the same model and decides the same; the main one (rank 0) alone writes and prints. Numbers and
files go as safetensors and JSON, never pickled.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dora_cli.errors import UserError

Parcel = tuple[dict[str, Tensor], Any]  # tensors, and what JSON can say


class EndedElsewhereError(Exception):
    """Another process of this run has failed, and says why itself.

    Args:
        code: the exit code that it ends with.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"another process of this run ended with code {code}")
        self.code = code


class NotMetError(Exception):
    """The other processes of this run did not come to the place where all meet."""


@dataclass(frozen=True)
class World:
    """One process among those of its run; alone by default, and then nothing here communicates.

    Attributes:
        rank: its number, from 0; ``size``: how many there are; ``local_rank``: its number on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's part: all parts together are ``items``, each once; sizes differ by one at most."""
        return items[self.rank :: self.size]

    def seed(self, *numbers: int) -> int:
        """A seed of 32 bits of these numbers, another one in each process."""
        return int.from_bytes(sha256(" ".join(map(str, (*numbers, "process", self.rank))).encode()).digest()[:4])

    # ---- in a step ---------------------------------------------------------------------------------------------
    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over processes, on its device: the same bits everywhere."""
        if not self.alone:
            dist.all_reduce(tensor)

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Everyone's whole numbers, by rank; the hosts wait for each other, and for no device."""
        if self.alone:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    # ---- now and then ------------------------------------------------------------------------------------------
    def gather(self, tensors: Mapping[str, Tensor], rest: Any = None) -> list[Parcel]:
        """Everyone's parcel, by rank, in every process. Tensors arrive on the CPU."""
        if self.alone:
            return [(dict(tensors), rest)]
        own = _packed(tensors, rest)
        sizes = [size for (size,) in self.exchange([len(own)])]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        parcels = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parcels, padded)
        return [_unpacked(parcel[:size]) for parcel, size in zip(parcels, sizes, strict=True)]

    def from_main(self, tensors: Mapping[str, Tensor], rest: Any = None) -> Parcel:
        """The main process's parcel, in every process; what the others pass does not matter. Tensors on the CPU."""
        if self.alone:
            return dict(tensors), rest
        parcel = _packed(tensors, rest) if self.is_main else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor(len(parcel))
        dist.broadcast(size, 0)
        if not self.is_main:
            parcel = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(parcel, 0)
        return _unpacked(parcel)

    def agreed(self, tensor: Tensor) -> Tensor:
        """The main process's values of a tensor that all have, of the same shape: a choice is made on them alone."""
        if self.alone:
            return tensor
        copy = tensor.contiguous().clone()
        dist.broadcast(copy, 0)
        return copy

    # ---- failing together --------------------------------------------------------------------------------------
    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes come through, or none: what fails within one ends the others too, who wait at the end.

        Nothing within may communicate. A mistake that several make alike is raised by the first of them.

        Raises:
            EndedElsewhereError: in a process where nothing failed, or what failed is said by another.
        """
        if self.alone:
            yield
            return
        caught: Exception | None = None
        try:
            yield
        except Exception as error:
            caught = error
        told = [rest for _, rest in self.gather({}, _told(caught))]
        failed = next((rank for rank, outcome in enumerate(told) if outcome is not None), None)
        if failed is None:
            return
        if caught is not None and told.index(_told(caught)) == self.rank:
            raise caught
        raise EndedElsewhereError(told[failed][0])

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns in the main process, which alone runs it; for all, as JSON gives it back."""
        result = None
        with self.together():
            if self.is_main:
                result = function()
        return self.from_main({}, result)[1]

    def agree(self, what: str, value: str, hint: str) -> None:
        """Refuse to go on where processes hold different values.

        Raises:
            UserError: in the main process, naming a process that differs.
        """
        values = [rest for _, rest in self.gather({}, value)]
        with self.together():
            differing = [str(rank) for rank, other in enumerate(values) if other != values[0]]
            if self.is_main and differing:
                raise UserError(
                    f"the processes of this run do not agree on {what}",
                    where=f"process {', '.join(differing[:8])} of {self.size} differs from process 0",
                    hint=hint,
                )


ALONE = World()


def environment() -> World:
    """This process as torchrun has named it in the environment; alone where it has not."""
    named = {name: os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}  # some set no local one
    if not all(value.isdecimal() for value in named.values()) or int(named["WORLD_SIZE"]) < 2:
        return ALONE
    return World(int(named["RANK"]), int(named["WORLD_SIZE"]), int(named["LOCAL_RANK"]))


def join(world: World, timeout: float) -> None:
    """Meet the other processes; from here on they can be spoken to.

    Tensors on a CPU go by gloo, those on CUDA by NCCL.

    Args:
        timeout: seconds that a process waits for the others, now and at any time.

    Raises:
        NotMetError: they did not come.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    except (dist.DistError, ValueError) as error:
        raise NotMetError(str(error).splitlines()[0]) from error


@cache
def mesh(device_type: str) -> DeviceMesh:
    """All processes in a row, for FSDP. To be asked for by all of them, the first time."""
    return init_device_mesh(device_type, (dist.get_world_size(),))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


SAID, WHY, LEFT = "dora/said", "dora/why", "dora/left"  # in the store that processes met by
LINGERS = 3.0  # seconds


def said_first(world: World, text: str) -> bool:
    """Whether this process is the first of those that have something to say, as all that fail alike say the same.

    What the first says is left for those who will miss it (``why``).
    """
    try:
        store = dist.distributed_c10d._get_default_store()
        first = store.compare_set(SAID + sha256(text.encode()).hexdigest(), "", str(world.rank))
        if first.decode() == str(world.rank):
            store.compare_set(WHY, "", f"process {world.rank}: {text.splitlines()[0] if text else ''}")
            return True
        return False
    except (RuntimeError, ValueError):  # nobody is there to ask
        return True


def why() -> str:
    """What the first process that failed has said; empty where none said anything."""
    try:
        found: str = dist.distributed_c10d._get_default_store().compare_set(WHY, "", "").decode()
        return found
    except (RuntimeError, ValueError):
        return ""


def linger(world: World) -> None:
    """Before a process ends early: the main one, which may keep the store, lets the others ask what they have to."""
    try:
        store = dist.distributed_c10d._get_default_store()
        left, begin = store.add(LEFT, 1), time.monotonic()
        while world.is_main and left < world.size and time.monotonic() - begin < LINGERS:
            time.sleep(0.02)
            left = store.add(LEFT, 0)
    except (RuntimeError, ValueError):
        return


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that other processes are out of reach."""
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))


def _told(error: Exception | None) -> list[Any] | None:
    """What other processes hear of an exception: exit code and text."""
    if error is None:
        return None
    if isinstance(error, EndedElsewhereError):
        return [error.code, ""]
    return [2 if isinstance(error, UserError) else 1, f"{type(error).__name__}: {error}"]


def _packed(tensors: Mapping[str, Tensor], rest: Any) -> Tensor:
    text = json.dumps(rest).encode()
    body = save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    return torch.frombuffer(bytearray(len(text).to_bytes(8, sys.byteorder) + text + body), dtype=torch.uint8)


def _unpacked(parcel: Tensor) -> Parcel:
    data = parcel.numpy().tobytes()
    end = 8 + int.from_bytes(data[:8], sys.byteorder)
    return load_tensors(data[end:]), json.loads(data[8:end])
