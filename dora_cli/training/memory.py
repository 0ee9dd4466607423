"""What a run will need at its peak, found by taking two steps of it without computing anything.

The real model, loss, clipping and optimizer run on torch's fake tensors, which have shapes but no data, on the largest
batch of the plan. A dispatch mode sees every tensor that comes to life and every one that is let go, so the estimate
needs no formula for any architecture, method or setting, gradient checkpointing and autocast included.

On a CPU the C library decides how much of the process stays resident, and its heap has gaps: half as much again as the
tensors is common. So each tensor's bytes are also asked for and given back with the real ``posix_memalign`` and
``free``, by which torch allocates, and the heap says how far it grew. Pages that nobody writes to cost nothing.
"""

import copy
import ctypes
import sys
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_cli.adapters.siblings import join
from dora_cli.models.quantised import held_tensors
from dora_cli.models.skeleton import saved_by_packing
from dora_cli.models.targets import outermost_lists
from dora_cli.modes import autocast, evaluating, same_random_numbers
from dora_cli.training.optim import build_optimizer
from dora_cli.training.setup import Batch, Session, checkpoint_activations
from dora_cli.training.summary import MIB, kernel_count, peak_rss_mib

STEPS = 2  # the second one has the moments of the first, and the heap it left
# What the process takes when it first trains, evaluates and saves: kernels, their scratch space, metrics, writers.
# Measured with MALLOC_MMAP_THRESHOLD_=131072, which leaves no gaps in the heap.
FIRST_USE = 32 * MIB
DEEP = 8  # transformer layers, more of which are not followed one by one where nothing else needs the model
LOOKS = 64  # the heap, which counts for a while, is asked whenever the tensors' bytes moved by this part of their peak


class NoEstimate(Exception):
    """The step could not be followed; the message says why, in one line."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak, by what they are for; ``total`` is their sum.

    On a CPU it stands for ``peak_rss_mib`` of the summary, else for ``peak_device_mib``: tensors on the device alone.

    Attributes:
        device: where the model trains.
        process: interpreter, libraries and tokenised data; 0 on other devices than the CPU.
        base: frozen parameters and buffers.
        trained: parameters that train, their gradients and moments.
        activations: all other tensors at the peak.
        gaps: what the C library's heap holds beyond the tensors in it; 0 on other devices.
        rows, tokens: of the batch at the peak.
        moment: what the run does then: ``training`` or ``evaluation``.
        step, evaluation: what ``activations`` come to in either; 0 where an evaluation can't need more than a step.
    """

    device: str
    process: int
    base: int
    trained: int
    activations: int
    gaps: int
    rows: int
    tokens: int
    moment: str
    step: int = 0
    evaluation: int = 0

    @property
    def total(self) -> int:
        return self.process + self.base + self.trained + self.activations + self.gaps

    def sentence(self) -> str:
        """In GiB, for the plan."""
        gib = {name: f"{getattr(self, name) / 2**30:.2f}" for name in ("process", "base", "trained", "activations")}
        parts = [f"{gib['process']} process"] if self.process else []
        parts += [f"{gib['base']} base", f"{gib['trained']} trained parameters, gradients and moments"]
        parts.append(f"{gib['activations']} activations ({self.rows} × {self.tokens} tokens)")
        parts += [f"{self.gaps / 2**30:.2f} gaps in the heap"] if self.gaps else []
        where = "" if self.process else f" on {self.device}"
        return f"{self.total / 2**30:.2f} GiB at the peak{where}, in {self.moment}: " + ", ".join(parts)


def estimate(session: Session, *, checkpointing: bool = False) -> MemoryEstimate:
    """The peak of a run before it starts, at the rank it starts with; the session is left as it was.

    Compiled code is taken to need what the plain one does.

    Args:
        session: what would run.
        checkpointing: as if ``train.gradient_checkpointing`` were set.

    Raises:
        NoEstimate: the model does something that can't be followed without data.
    """
    on_cpu = session.device.type == "cpu"
    weights = list(held_tensors(session.model))
    whole = _bytes(weights)
    resident = resident_bytes() + (whole if session.hollow else unread_bytes(weights)) if on_cpu else 0
    peak_before = peak_rss_mib() * MIB if on_cpu else 0
    train, evaluation = _largest(session, ["train"]), _largest(session, [r for r in session.encoded if r != "train"])
    try:
        depth = _depth(session.model) if session.hollow else 0
        if depth <= DEEP:
            peaks = _followed(session, train, evaluation, checkpointing)
        else:  # layers are alike: what two and two more of them take is enough to know, and 80 would take minutes
            few, more = (_followed(session, train, evaluation, checkpointing, n) for n in (2, 4))
            peaks = few.extended(more, (depth - 2) / 2)
    # A dry run says what it can, whatever a model's own code raises here.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:120]
        raise NoEstimate(f"{type(error).__name__}: {reason}".rstrip(": ")) from error

    trained = session.trained_parameters().values()
    own = _bytes(trained)
    peak = max(peaks.training, peaks.evaluation)
    kept = min(peaks.moments + _bytes(p for p in trained if p.requires_grad), peak)
    moment, batch = ("evaluation", evaluation) if peaks.evaluation > peaks.training else ("training", train)
    # A heap asked for more than there is says nothing of what a machine with enough of it would do.
    beyond = peaks.heap - peak if peaks.heap and on_cpu and not session.hollow else 0
    # The heap's free memory is used first. What was needed up to here, say to load the weights, is the least.
    process = max(resident + FIRST_USE + min(beyond, 0), peak_before - peak - max(beyond, 0)) - whole
    rows, tokens = batch["input_ids"].shape
    saved = saved_by_packing(session.model, session.config.model.quantization if session.hollow else None)
    return MemoryEstimate(
        device=str(session.device),
        process=max(process, 0) if on_cpu else 0,
        base=whole - own - sum(saved.values()),
        trained=own + kept,
        activations=peak - kept,
        gaps=max(beyond, 0),
        rows=rows,
        tokens=tokens,
        moment=moment,
        step=max(peaks.training - kept, 0),
        evaluation=max(peaks.evaluation - kept, 0),
    )


@dataclass(frozen=True)
class _Peaks:
    """Bytes beside the weights: at the peak of a step and of an evaluation, of the optimizer, and of the heap."""

    training: int
    evaluation: int
    moments: int
    heap: int

    def extended(self, more: "_Peaks", times: float) -> "_Peaks":
        """These, and ``times`` the difference that ``more`` makes."""
        pairs = zip(astuple(self), astuple(more), strict=True)
        return _Peaks(*(max(0, round(a + (b - a) * times)) for a, b in pairs))


def _followed(
    session: Session, train: Batch, evaluation: Batch, checkpointing: bool, depth: int | None = None
) -> _Peaks:
    """Take the steps; of a hollow model perhaps with the first ``depth`` transformer layers alone."""
    live, fake = _Live(session.device), _fake_tensors()
    # Before tensors are fake: importances that watch layers are copied along.
    twin = _twin(session, fake)
    if depth is not None:
        for blocks in outermost_lists(twin):
            del blocks[depth:]
    if checkpointing:
        checkpoint_activations(twin)
    modules = dict(twin.named_modules())
    layers: dict[str, Any] = {name: modules[name] for name in session.layers if name in modules}
    weights = list(held_tensors(twin))
    with _untouched(session.model), fake, live:
        # Counted apart. Layers read them as they are, since some ask for their exact type, and get these instead.
        live.leave_out(weights if session.hollow else [fake.from_tensor(t) for t in weights])
        if session.hollow and not session.config.train.compile:  # then set-up could not find out
            twin.train()
            join(layers, partial(_forward, session, twin, {k: v[:1] for k, v in train.items()}))
            live.peak = live.now
        optimizer = _train(session, twin, layers, train)
        in_training, in_evaluation, live.peak = live.peak, 0, live.now
        if evaluation["input_ids"].numel() > train["input_ids"].numel():  # without a graph less is never more
            with evaluating(twin):
                _forward(session, twin, evaluation)
            in_evaluation = live.peak
        moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        del twin, optimizer
    return _Peaks(in_training, in_evaluation, moments, live.heap_growth)


def _depth(model: nn.Module) -> int:
    """How many transformer layers there are; 0 where they stand in lists of several lengths."""
    lengths = {len(layers) for layers in outermost_lists(model)}
    return lengths.pop() if len(lengths) == 1 else 0


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not say, the most it has been."""
    now = kernel_count("VmRSS")
    return peak_rss_mib() * MIB if now is None else now


def unread_bytes(tensors: Iterable[Tensor]) -> int:
    """What is not resident yet of the files that hold these tensors: weights are mapped, and read when first used."""
    places = sorted(t.data_ptr() for t in tensors)
    unread, holds = 0, False
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        first, *rest = line.split()
        if not first.endswith(":"):  # start-end permissions offset device inode path
            start, end = (int(address, 16) for address in first.split("-"))
            holds = rest[-1].startswith("/") and bisect_left(places, start) < bisect_left(places, end)
        elif holds and first in ("Size:", "Rss:"):
            unread += int(rest[0]) * (1024 if first == "Size:" else -1024)
    return unread


def _largest(session: Session, roles: list[str]) -> Batch:
    """Copies of the longest rows of these splits, as many as a batch has: as large as batches get."""
    config = session.config.train
    largest: Batch = {}
    for role in roles:
        encoded = session.encoded[role]
        size = min(config.batch_size if role == "train" else config.eval_batch_size, len(encoded))
        batch = encoded.batch(encoded.longest(size))
        if not largest or batch["input_ids"].numel() > largest["input_ids"].numel():
            largest = batch
    return largest


def _train(session: Session, model: nn.Module, layers: dict[str, Any], batch: Batch) -> torch.optim.Optimizer:
    """Steps as the loop takes them, holding on to what it holds on to."""
    config = session.config.train
    optimizer = build_optimizer(model, layers, session.head_modules, config)
    count = session.task.count(batch)
    model.train()
    for _ in range(STEPS):
        for _ in range(min(config.accumulation, 2)):  # from the second one on gradients are there from the start
            inputs = _moved(session, batch)
            with autocast(session.device, session.autocast_dtype):
                loss = session.task.loss(model, inputs).total
            (loss / count).backward()
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def _forward(session: Session, model: nn.Module, batch: Batch) -> None:
    with torch.no_grad(), autocast(session.device, session.autocast_dtype):
        session.task.loss(model, _moved(session, batch))


def _moved(session: Session, batch: Batch) -> Batch:
    """A batch of this shape on the device, of fake tensors where they are on."""
    return {name: torch.empty(t.shape, dtype=t.dtype, device=session.device) for name, t in batch.items()}


def _twin(session: Session, fake: Any) -> nn.Module:
    """The same modules over the very same parameters: what modules keep on the way stays out of the real ones.

    A hollow model gets fake parameters on the device where real ones would be.
    """
    memo: dict[int, Tensor] = {}
    with fake:
        for t in [*session.model.parameters(), *session.model.buffers(), *held_tensors(session.model)]:
            memo[id(t)] = torch.empty_like(t, device=session.device) if session.hollow else t
            if session.hollow and isinstance(t, nn.Parameter):
                memo[id(t)] = nn.Parameter(memo[id(t)], t.requires_grad)
    return copy.deepcopy(session.model, memo=memo)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Leave gradients and random numbers as they are."""
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        with same_random_numbers():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _fake_tensors() -> Any:
    """Tensors without data; what is real goes in as if it had none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages on a device that operations make, while they live.

    Attributes:
        peak: the most bytes alive at once.
        heap_growth: bytes by which the C library's heap grew to hold them; 0 where it does not say.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device.type
        self.now = self.peak = self.heap_growth = 0
        self._known: dict[int, Any] = {}  # id of a storage → what says when it is gone
        self._looked = 0  # bytes alive when the heap was last asked
        self._heap = _Heap() if device.type == "cpu" and _Heap.speaks() else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # A model asks for a value to decide on something, e.g. whether all tokens are real, or a layer is skipped.
            return False if args[0].dtype == torch.bool else 1
        out = func(*args, **(kwargs or {}))
        for leaf in [out] if isinstance(out, Tensor) else tree_leaves(out):
            # Asking a fake tensor for its device takes longer than all else here, and on the CPU there is no other.
            if isinstance(leaf, Tensor) and (self.device == "cpu" or leaf.device.type == self.device):
                self._count(leaf.untyped_storage())
        return out

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Never count these tensors' storages, nor views of them."""
        self._known |= {id(storage): storage for storage in (t.untyped_storage() for t in tensors)}

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        block = self._heap.take(size) if self._heap else None

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]
            if self._heap:
                self._heap.give_back(block)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
        if self._heap and abs(self.now - self._looked) * LOOKS > self.peak:
            self._looked = self.now
            self.heap_growth = max(self.heap_growth, self._heap.growth())


class _Heap:
    """The C library's own allocator, asked as torch asks it. Nothing is written, so nothing becomes resident."""

    ALIGNMENT = 64  # as torch's

    def __init__(self) -> None:
        self._c = ctypes.CDLL(None)
        self._c.mallinfo2.restype = _Mallinfo
        self._c.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
        self._c.free.argtypes = [ctypes.c_void_p]
        self._start = self._held()

    @staticmethod
    def speaks() -> bool:
        """Whether it tells its size: glibc from 2.33 on."""
        return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")

    def take(self, size: int) -> ctypes.c_void_p:
        """A null pointer where there is no room: the estimate may be larger than the machine."""
        block = ctypes.c_void_p()
        if size:
            self._c.posix_memalign(ctypes.byref(block), self.ALIGNMENT, size)
        return block

    def give_back(self, block: ctypes.c_void_p | None) -> None:
        self._c.free(block)

    def growth(self) -> int:
        return self._held() - self._start

    def _held(self) -> int:
        info = self._c.mallinfo2()
        return int(info.arena + info.hblkhd)


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2``: arena, the heap's bytes; hblkhd, those of blocks that have mappings of their own."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]
