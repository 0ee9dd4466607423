"""On how many devices of which size a run fits: arithmetic over the estimate of one process.

Of several processes each holds the base (or with ``train.shard=full`` its part, and for a while what is gathered of the
rest), all that trains, and the activations of its share of the rows; an evaluation batch is each process's own.
"""

from dataclasses import dataclass
from math import ceil

from torch import nn

from dora_cli.adapters.base import is_packed
from dora_cli.models.quantised import held_bytes
from dora_cli.models.skeleton import saved_by_packing
from dora_cli.models.targets import blocks
from dora_cli.training.memory import MemoryEstimate

SIZES = (24, 40, 48, 80, 141)  # GB of memory that accelerators are sold with
DEVICES = (1, 2, 4, 8)
USABLE = 0.9  # of the memory: the rest is for the driver's context, the kernels' scratch space, and gaps
GATHERED = 2  # transformer layers at a time: one is computed with while the next one arrives
GB = 2**30


@dataclass(frozen=True)
class Base:
    """Bytes of the frozen parameters: in all, of the largest transformer layer, and outside the layers; and whether
    they can be sharded, as packed ones cannot."""

    whole: int
    layer: int
    outside: int
    splits: bool = True


def frozen_base(model: nn.Module, quantization: str | None = None) -> Base:
    """The bytes that frozen parameters are held in, packed ones as they are packed.

    Args:
        model: the model, with its adapters.
        quantization: how a hollow model would be packed.
    """
    saved = saved_by_packing(model, quantization)

    def frozen(module: nn.Module) -> int:
        trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        return held_bytes(module) - trained - sum(saved.get(id(p), 0) for p in module.parameters())

    layers, whole = [frozen(block) for block in blocks(model)], frozen(model)
    packed = quantization is not None or any(is_packed(module) for module in model.modules())
    return Base(whole, max(layers, default=0), whole - sum(layers), splits=not packed)


def need(estimate: MemoryEstimate, base: Base, batch_size: int, devices: int, *, sharded: bool) -> int:
    """Bytes that each of so many devices must have."""
    share = ceil(batch_size / devices) / batch_size
    activations = max(round(estimate.step * share), estimate.evaluation)
    held = estimate.base
    if sharded:  # what lies outside the layers stays gathered from the forward to the backward pass
        held += -base.whole + ceil(base.whole / devices) + base.outside + GATHERED * base.layer
    return held + estimate.trained + activations


@dataclass(frozen=True)
class Way:
    """So many devices, and the bytes that each of them needs."""

    devices: int
    sharded: bool
    each: int

    def __str__(self) -> str:
        what = f"{self.devices} device" + ("s" if self.devices > 1 else "") + (", train.shard=full" * self.sharded)
        return f"{what} ({memory_size(self.each)} each)"


def memory_size(n: int) -> str:
    """Bytes for people: in GiB, and below one in MiB."""
    return f"{n / GB:,.1f} GiB" if n >= GB else f"{max(1, round(n / 2**20)):,} MiB"


def fits(estimate: MemoryEstimate, base: Base, batch_size: int, frugal: MemoryEstimate | None = None) -> dict[str, str]:
    """For the plan: size → the fewest devices of that size, and how much each of them needs; up to where one is enough.

    Args:
        estimate: of one process with the whole batch.
        base: what is frozen.
        batch_size: rows of a micro-batch, of all processes together.
        frugal: the estimate with gradient checkpointing; shown where it makes a difference.
    """
    found = {}
    most = max(n for n in DEVICES if n <= batch_size)
    why = "" if most == DEVICES[-1] else f" (of train.batch_size={batch_size} each needs a row)"
    for size in SIZES:
        there = ways(estimate, base, batch_size, size)
        less = ways(frugal, base, batch_size, size) if frugal is not None else there
        text = ", or ".join(map(str, there)) or f"more than {most} device{'s' if most > 1 else ''}{why}"
        if less and [(w.devices, w.sharded) for w in less[:1]] != [(w.devices, w.sharded) for w in there[:1]]:
            text += "; by train.gradient_checkpointing=true " + ", or ".join(map(str, less))
        found[f"{size} GB"] = text
        if there and there[0].devices == 1:
            break  # larger ones take it as well
    return found


def fits_alone(estimate: MemoryEstimate, base: Base) -> bool:
    """Whether the smallest device holds the run."""
    return need(estimate, base, 1, 1, sharded=False) <= USABLE * SIZES[0] * GB


def ways(estimate: MemoryEstimate, base: Base, batch_size: int, size: int) -> list[Way]:
    """On how many devices of ``size`` GB the run fits: the fewest, and before them fewer where the base is sharded;
    empty where there is no way."""
    found: list[Way] = []
    fewest = DEVICES[-1] + 1
    for sharded in (False, True) if base.splits else (False,):
        for n in DEVICES[sharded:]:
            each = need(estimate, base, batch_size, n, sharded=sharded)
            if n < fewest and n <= batch_size and each <= USABLE * size * GB:
                fewest = n
                found.insert(0, Way(n, sharded, each))
                break
    return found
