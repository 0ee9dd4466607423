"""AFLoRA (Liu et al., ACL 2024, arXiv 2403.13269): y = W₀x + s_b ⊙ B(s_d ⊙ A x), projections A and B freeze over time.

The vectors s_d and s_b always train; a unit is one projection tensor, and the only verbs are ``freeze`` and ``thaw``.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import AdapterLayer, linear_shape, uniform
from dora_cli.adapters.part import RankedPart


class AfloraLayer(AdapterLayer):
    """Units, in order: A (r, d_in), then B (d_out, r)."""

    no_decay = frozenset({"s_d", "s_b"})

    def __init__(self, base: nn.Module, rank: int, dropout: float, freeze_square: bool) -> None:
        super().__init__(base)
        self.a = nn.Parameter(uniform(rank, self.d_in, (6 / self.d_in) ** 0.5, base.weight))  # type: ignore[arg-type]
        self.b = nn.Parameter(uniform(self.d_out, rank, (6 / max(rank, 1)) ** 0.5, self.a))
        self.s_d = nn.Parameter(torch.full((rank,), 0.1, device=self.a.device))
        self.s_b = nn.Parameter(torch.zeros(self.d_out, device=self.a.device))
        self.dropout = dropout
        if freeze_square and self.d_in == self.d_out:
            self.freeze(torch.arange(2))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def updated(self, x: Tensor, out: Tensor) -> Tensor:
        if self.rank == 0:
            return out
        hidden = nn.functional.linear(self.adapter_input(x), self.a) * self.s_d
        return out + (nn.functional.linear(hidden, self.b) * self.s_b).to(out.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """A' = diag(s_d) A, B' = diag(s_b) B, exactly."""
        a = self.s_d.detach().float()[:, None] * self.a.detach().float()
        return a, self.s_b.detach().float()[:, None] * self.b.detach().float()

    def unit_costs(self) -> list[int]:
        return [self.a.numel(), self.b.numel()]

    def unit_tensors(self) -> list[nn.Parameter]:
        return [self.a, self.b]

    def frozen_units(self) -> list[bool]:
        return [not tensor.requires_grad for tensor in self.unit_tensors()]

    def start_from_rows(self, a: Tensor) -> None:
        """Take ``a`` (r, d_in) as A; s_b = 0 keeps the identity."""
        with torch.no_grad():
            self.a.copy_(a)


@dataclass
class Aflora(RankedPart):
    """A, B Kaiming-uniform, s_d = 0.1, s_b = 0: the identity at the start (METHODS 8)."""

    freeze_square: bool = field(
        default=True, metadata={"help": "projections of square weights are frozen from the start (the authors' code)"}
    )

    units: ClassVar[tuple[str, ...]] = ("tensors", "modules")
    verbs: ClassVar[frozenset[str]] = frozenset({"freeze", "thaw"})

    def layer(self, base: nn.Module, rank: int) -> AfloraLayer:
        linear_shape(base)  # refuses what is not linear
        return AfloraLayer(base, rank, self.dropout, self.freeze_square)
