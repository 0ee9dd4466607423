"""B-LoRA (Meo et al., WANT@ICML 2024, arXiv 2406.13046): ΔW = (α/r) Q(B) diag(g̃ ∘ Q(E)) Q(A), rank and bits are gated.

Rank gates are nested: component i takes part only together with all before it, and the first always does. Each of A, B
and E has a quantiser with a learned range and a gate for every doubling of its bits. See ``quantise.py`` and METHODS 6.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import LowRankLayer, linear_shape
from dora_cli.adapters.part import LowRankPart
from dora_cli.adapters.quantise import (
    BITS,
    SWITCH_OFF,
    decided,
    effective_bits,
    first_open,
    nested,
    quantise,
    round_through,
    sampled,
)

OPEN = 6.0  # φ at the start: P(open) = 0.9995
STDS = (0.02, 0.02, 1.0)  # of A, B and E at the start


class GatedLayer(LowRankLayer):
    """``c`` is E; ``phi`` (r,) rank-gate logits, ``bit_logits`` (3, n) and ``log_ranges`` (3,) of A, B and E.

    Ranges are kept as logarithms: a range of 0.06 under Adam at 1e-2 would pass zero within a few steps.
    """

    unit_axes: ClassVar[Mapping[str, int]] = {"a": 0, "b": 1, "c": 0, "phi": 0}
    nested = True
    adds = False
    no_decay = frozenset({"c", "phi", "bit_logits", "log_ranges"})

    def __init__(
        self, base: nn.Module, a: Tensor, b: Tensor, c: Tensor, scale: float, dropout: float, n_bits: int
    ) -> None:
        super().__init__(base, a, b, c, scale, dropout)
        self.phi = nn.Parameter(torch.full_like(c, OPEN))
        self.bit_logits = nn.Parameter(torch.full((3, BITS.index(n_bits)), OPEN, device=a.device))
        self.log_ranges = nn.Parameter(torch.zeros(3, device=a.device))
        self.settled = False  # after the final choice nothing is drawn any more
        self.calibrate()

    def calibrate(self) -> None:
        """Set every range to its tensor's largest entry, but to no less than the start's standard deviation.

        A hair above it: what lies on the edge is clipped, and would not train.
        """
        with torch.no_grad():
            for i, (tensor, std) in enumerate(zip((self.a, self.b, self.c), STDS, strict=True)):
                largest = tensor.abs().max() if tensor.numel() else tensor.new_zeros(())
                self.log_ranges[i] = largest.clamp_min(std).log() + 1e-5

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        bits, ranks = self._drawn() if self.training and not self.settled else self._decided()
        a, b, c = self._quantised(bits)
        factor = c * ranks * self.scale
        return a, b, factor if self.probe_mask is None else factor * self.probe_mask

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b, _ = self._quantised(self._decided()[0])
        return a, b

    def gates(self) -> Tensor:
        """(r,) Q(E), 0 where a rank gate is shut."""
        bits, ranks = self._decided()
        return self._quantised(bits)[2] * ranks

    def open_units(self) -> Tensor:
        return self._decided()[1].detach().cpu() > 0

    def settle(self) -> None:
        """The kept components' rank gates are open for good; bit gates stay what they are without noise."""
        self.settled = True

    def side_state(self) -> dict[str, Tensor]:
        """Of A, B and E: the bits in use and the ranges, (3,); and the logits of all gates."""
        state = {
            "bits": effective_bits(self._decided()[0]).long(),
            "ranges": self.log_ranges.exp(),
            "bit_logits": self.bit_logits,
            "rank_logits": self.phi,
        }
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def start_from_rows(self, a: Tensor) -> None:
        """Take ``a`` (r, d_in) as A; B = 0 makes it the identity, with B's range as drawn."""
        with torch.no_grad():
            self.a.copy_(a)
            self.b.zero_()
        self.calibrate()

    def load_low_rank(self, a: Tensor, b: Tensor) -> None:
        """Start from a trained pair, to within its quantisation; the components beyond it start with b = 0."""
        with torch.no_grad():
            self.b.zero_()
        super().load_low_rank(a, b)
        self.calibrate()

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Nested gates with noise: of bits (3, n), and of ranks (r,) rounded straight-through."""
        bits = sampled(self.bit_logits) * (self.bit_logits > SWITCH_OFF)
        return nested(bits), round_through(nested(first_open(sampled(self.phi))))

    def _decided(self) -> tuple[Tensor, Tensor]:
        """Nested gates without noise: of bits (3, n), and of ranks (r,)."""
        ranks = torch.ones_like(self.phi) if self.settled else nested(first_open(decided(self.phi)))
        return nested(decided(self.bit_logits)), ranks

    def _quantised(self, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = (
            quantise(tensor, x_max, gates)
            for tensor, x_max, gates in zip((self.a, self.b, self.c), self.log_ranges.exp(), bits, strict=True)
        )
        return a, b, c


@dataclass
class Gated(LowRankPart):
    """A, B ~ N(0, 0.02²), E ~ N(0, 1), every gate open: as published, not the identity at the start (METHODS 6)."""

    n_bits: int = field(default=16, metadata={"help": "bits of A, B and E with all bit gates open", "choices": BITS})
    gate_learning_rate: float = field(default=1e-2, metadata={"help": "peak rate of the gates' logits", "above": 0.0})
    range_learning_rate: float = field(
        default=1e-2, metadata={"help": "peak rate of the ranges' logarithms", "above": 0.0}
    )

    verbs: ClassVar[frozenset[str]] = frozenset({"silence", "drop"})
    provides: ClassVar[frozenset[str]] = frozenset({"rows", "gates", "gate_probability"})
    min_rank: ClassVar[int] = 1
    no_packed_base: ClassVar[str] = "it rounds what it adds, and would learn to make up for the base's rounding"

    def layer(self, base: nn.Module, rank: int) -> GatedLayer:
        d_out, d_in = linear_shape(base)
        device = next(base.parameters()).device
        a, b, c = (
            torch.randn(shape).to(device) * std  # drawn on the CPU, the same everywhere
            for shape, std in zip(((rank, d_in), (d_out, rank), (rank,)), STDS, strict=True)
        )
        layer = GatedLayer(base, a, b, c, self.scale(rank), self.dropout, self.n_bits)
        gates = dict.fromkeys(("phi", "bit_logits"), self.gate_learning_rate)
        layer.learning_rates = gates | {"log_ranges": self.range_learning_rate}
        return layer
