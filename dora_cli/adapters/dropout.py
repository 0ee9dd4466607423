"""Dropout for adapters: masks are windows of one random sequence, so that a mask costs one reading and no drawing.

Drawing a number for every entry of every adapter's input costs as much on a CPU as half the model. A long sequence of
independent entries, drawn once, and a window of it that begins at a random place costs next to nothing. Any two entries
of a mask are independent, since the window is shorter than the sequence, and the masks of two steps are uncorrelated:
they begin at places that have nothing to do with each other. A module that a model calls several times in one pass
(layers that ALBERT shares) has one mask for all calls.

Where a window begins is a function of (seed, step, micro-batch, group) alone: recomputation under gradient
checkpointing and a resumed run see the same masks, whatever else draws random numbers.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 22  # entries drawn at once; the shortest sequence
MARK = "|"  # between the names of siblings, in that of their group
ALIGNMENT = 16  # windows begin at multiples of this, so that they can be read a register at a time

# Modules of one parent that read the same input, by the names that architectures give them.
SIBLINGS = (
    {"query", "key", "value"},
    {"query_proj", "key_proj", "value_proj"},
    {"q_proj", "k_proj", "v_proj"},
    {"q_lin", "k_lin", "v_lin"},
    {"q", "k", "v"},
    {"gate_proj", "up_proj"},
    {"wi_0", "wi_1"},
    {"w1", "w3"},
)


def groups_of(names: Iterable[str], *, shared: bool) -> dict[str, str]:
    """Module → the group whose mask it uses: its own name, or where masks are ``shared`` one for all its siblings."""
    groups = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        family = next((s for s in SIBLINGS if child in s), {child}) if shared else {child}
        if _is_cross_attention(parent):  # its query reads another input
            family = {s for s in family if s.startswith("q") == child.startswith("q")}
        groups[name] = f"{parent}.{MARK.join(sorted(family))}" if len(family) > 1 else name
    return groups


def _is_cross_attention(parent: str) -> bool:
    """By the names that architectures give it, ``parent`` being that of a projection."""
    own = parent.split(".")[-2:]  # BERT's is crossattention.self
    return any("cross" in n or n in ("EncDecAttention", "encoder_attn", "encoder_decoder_attention") for n in own)


class Dropped(NamedTuple):
    """An input after dropout, without graph, and the mask it was made with: 0, or 1 / (1 − p)."""

    values: Tensor
    mask: Tensor


class Masks:
    """The masks of one run.

    Args:
        p: probability of zeroing an entry, in [0, 1). In bfloat16 it becomes the nearest one for which 1 / (1 − p) is a
            number of that type, so that the mean of a mask stays 1.
        seed: of the sequence and of the places.
    """

    def __init__(self, p: float, seed: int) -> None:
        self.p = p
        self.seed = seed
        self._position = (0, 0)
        self._sequences: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._last: tuple[str, Tensor, int, Dropped] | None = None  # group, input and its version, what became of it

    def move(self, step: int, micro_batch: int) -> None:
        """From now on give the masks of this micro-batch of this step."""
        self._position = (step, micro_batch)
        self._last = None

    def drop(self, x: Tensor, group: str, dtype: torch.dtype | None = None) -> Dropped:
        """``x`` in ``dtype`` under the group's mask. Siblings that are given the same tensor in turn share the work."""
        if self._last is not None and not x.is_inference():
            last_group, last_x, version, dropped = self._last
            if last_group == group and last_x is x and version == x._version:
                return dropped
        with torch.no_grad():
            values = x.to(dtype or x.dtype)
            mask = self.window(values, group)
            dropped = Dropped(values * mask, mask)
        shared = MARK in group and not x.is_inference()
        self._last = (group, x, x._version, dropped) if shared else None
        return dropped

    def window(self, x: Tensor, group: str) -> Tensor:
        """The mask of a group for an input of this shape, type and device."""
        size = BLOCK
        while size < 2 * x.numel():
            size *= 2
        sequence = self._sequence(size, x.device, x.dtype)
        # The places depend on the size of the input, not on how long the sequence happens to be by now.
        places = (size - x.numel()) // ALIGNMENT + 1
        text = f"{self.seed} {self._position[0]} {self._position[1]} {group}"
        start = int.from_bytes(sha256(text.encode()).digest()[:8]) % places * ALIGNMENT
        return sequence[start : start + x.numel()].view(x.shape)

    def _sequence(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The first ``size`` entries or more, of 0 and 1 / (1 − p); what is there already is not drawn again."""
        known = self._sequences.get((device, dtype), torch.empty(0, device=device, dtype=dtype))
        if len(known) >= size:
            return known
        scale = torch.tensor(1 / (1 - self.p), dtype=dtype)
        sequence = torch.empty(size, device=device, dtype=dtype)
        sequence[: len(known)] = known
        for block in range(len(known) // BLOCK, size // BLOCK):
            digest = sha256(f"{self.seed} block {block}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
            kept = torch.rand(BLOCK, generator=generator) < 1 / scale.double()
            torch.mul(kept.to(device), scale.to(device), out=sequence[block * BLOCK : (block + 1) * BLOCK])
        self._sequences[device, dtype] = sequence
        return sequence


def attach(layers: Mapping[str, object], p: float, seed: int, *, shared: bool) -> Masks | None:
    """Give every layer its masks; None where nothing is dropped, and layers keep to torch's own dropout."""
    if p == 0 or not layers:
        return None
    masks = Masks(p, seed)
    for name, group in groups_of(layers, shared=shared).items():
        layers[name].masks, layers[name].mask_group = masks, group  # type: ignore[attr-defined]
    return masks
