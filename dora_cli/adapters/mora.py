"""MoRA (Jiang et al. 2024, arXiv 2405.12130): y = W₀x + f_dec(M f_comp(x)), one square matrix M of high rank.

f_comp folds the input to the side r̂ of M, f_dec unfolds the result to the output; neither is trained. ``sharing`` adds
entries r̂ apart, and is exactly a LoRA of rank r̂. ``rotation`` cuts the input into blocks, turns block j by RoPE's
angles of position j and gives all blocks the same M: ΔW is block-diagonal and can have full rank.
"""

from dataclasses import dataclass, field
from math import ceil, isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import AdapterLayer, linear_shape
from dora_cli.adapters.part import RANK_HELP, TARGETS_HELP, AdapterPart


def square_side(d_out: int, d_in: int, rank: int) -> int:
    """r̂ = ⌊√((d_in + d_out) · rank)⌋: the largest square with no more parameters than a LoRA of that rank."""
    return isqrt((d_in + d_out) * rank)


def wrapped(x: Tensor, length: int) -> Tensor:
    """The first ``length`` entries of x repeated for ever along its last axis: it is padded circularly, or cut."""
    copies, rest = divmod(length, x.shape[-1])
    if copies == 0:
        return x[..., :rest]
    return x if length == x.shape[-1] else torch.cat([x] * copies + [x[..., :rest]], dim=-1)


def folded(y: Tensor, length: int) -> Tensor:
    """Adjoint of ``wrapped``: entry i is the sum of the entries of y at i, i + length, i + 2 · length, …"""
    place = torch.arange(y.shape[-1], device=y.device) % length
    return y.new_zeros(*y.shape[:-1], length).index_add(-1, place, y)


def compressed(x: Tensor, side: int) -> Tensor:
    """C x for x (…, d_in): circularly padded to a multiple of ``side``, entries that far apart are added, (…, side)."""
    blocks = ceil(x.shape[-1] / side)
    return wrapped(x, blocks * side).unflatten(-1, (blocks, side)).sum(-2)


def sharing_factors(v: Tensor, u: Tensor, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """V C (r, d_in) and D U (d_out, r) of factors V (r, r̂) and U (r̂, r) inside the square.

    C[j, i] counts the padded places p ≡ j (mod r̂) that hold input i, and D[k, j] = [k ≡ j (mod r̂)].
    """
    side = v.shape[-1]
    return folded(wrapped(v, ceil(d_in / side) * side), d_in), wrapped(u.T, d_out).T


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_k, x_{k + r̂/2}) of the last axis turned by its angle; the halves pair up."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotations(blocks: int, side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (blocks, r̂/2), of RoPE's angle j · 10000^(−2k/r̂) for block j and pair k, in the type of ``like``."""
    rates = 10000.0 ** (-torch.arange(0, side, 2, dtype=torch.float64) / side)
    angles = torch.arange(blocks, dtype=torch.float64)[:, None] * rates
    return angles.cos().to(like.dtype).to(like.device), angles.sin().to(like.dtype).to(like.device)


def rotation_blocks(side: int, d_out: int, d_in: int) -> int:
    """How many blocks the input has; without those whose output would be cut off."""
    return min(ceil(d_in / side), ceil(d_out / side))


def rotation_delta(m: Tensor, d_out: int, d_in: int) -> Tensor:
    """ΔW (d_out, d_in) of the rotation: M R_j for each block j on the diagonal, padded columns folded back."""
    side = m.shape[0]
    if side == 0:
        return m.new_zeros(d_out, d_in)
    blocks = rotation_blocks(side, d_out, d_in)
    cos, sin = rotations(blocks, side, m)
    # The rows of M R_j are those of M turned back by block j's angles.
    diagonal = torch.block_diag(*turned(m.expand(blocks, side, side), cos[:, None], -sin[:, None]))
    return wrapped(folded(diagonal, d_in).T, d_out).T


class MoraLayer(AdapterLayer):
    """A frozen base and a square M, ``m`` (r̂, r̂), that starts at zero. Without M's entries there is no update."""

    def __init__(self, base: nn.Module, m: Tensor, dropout: float) -> None:
        super().__init__(base)
        self.m = nn.Parameter(m)
        self.dropout = dropout

    @property
    def rank(self) -> int:
        """The side of the square."""
        return self.m.shape[0]

    def unit_costs(self) -> list[int]:
        return [self.m.numel()]

    def updated(self, x: Tensor, out: Tensor) -> Tensor:
        if self.rank == 0:
            return out
        return out + self.update(self.adapter_input(x)).to(out.dtype)

    def update(self, x: Tensor) -> Tensor:
        """What is added to the base's output, (…, d_out), for an input that is cast and dropped out already."""
        raise NotImplementedError


class SharingLayer(MoraLayer):
    """ΔW = D M C: exactly a LoRA with A = M C and B = D."""

    def update(self, x: Tensor) -> Tensor:
        return wrapped(nn.functional.linear(compressed(x, self.rank), self.m), self.d_out)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        m = self.m.detach().float()
        return sharing_factors(m, torch.eye(self.rank, device=m.device), self.d_out, self.d_in)


class RotationLayer(MoraLayer):
    """ΔW = the blocks M R_j on the diagonal: no low-rank pair; an input block beyond the output's length is unused."""

    is_low_rank = False
    cos: Tensor
    sin: Tensor

    def __init__(self, base: nn.Module, m: Tensor, dropout: float) -> None:
        super().__init__(base, m, dropout)
        self.blocks = rotation_blocks(self.rank, self.d_out, self.d_in) if self.rank else 0
        cos, sin = rotations(self.blocks, self.rank, m)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def update(self, x: Tensor) -> Tensor:
        x = wrapped(x, self.blocks * self.rank).unflatten(-1, (self.blocks, self.rank))
        x = turned(x, self.cos.to(x.dtype), self.sin.to(x.dtype))
        return wrapped(nn.functional.linear(x, self.m).flatten(-2), self.d_out)

    def delta_weight(self) -> Tensor:
        return rotation_delta(self.m.detach().float(), self.d_out, self.d_in)


@dataclass
class Mora(AdapterPart):
    """M = 0, no alpha: the scale is 1. ``rank`` is that of a LoRA of no fewer parameters, (d_in + d_out) · rank."""

    rank: int | None = field(default=None, metadata={"help": RANK_HELP, "low": 1})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input", "low": 0.0, "below": 1.0})
    targets: Any = field(default=None, metadata={"help": TARGETS_HELP})
    kind: str = field(
        default="rotation",
        metadata={"help": "blocks turned (for small ranks), or entries shared", "choices": ("rotation", "sharing")},
    )

    units: ClassVar[tuple[str, ...]] = ("modules",)
    export: ClassVar[str] = "square"
    size_word: ClassVar[str] = "side of the square"
    instead: ClassVar[str] = "; adapter=mora_components can be pruned"

    def __post_init__(self) -> None:
        if self.kind == "sharing":
            self.export = "lora"  # type: ignore[misc]  # a plain pair, whatever the class says

    def layer(self, base: nn.Module, rank: int) -> MoraLayer:
        side = square_side(*linear_shape(base), rank)
        rotates = self.kind == "rotation"
        side -= side % 2 if rotates else 0  # entries turn in pairs
        m = torch.zeros(side, side, device=next(base.parameters()).device)
        return (RotationLayer if rotates else SharingLayer)(base, m, self.dropout)
