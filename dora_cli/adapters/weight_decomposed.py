"""Weight-decomposed LoRA (Liu et al., ICML 2024, arXiv 2402.09353, the other "DoRA"): magnitude and direction apart.

W' = diag(m / n) (W₀ + s B A) with n the norms of the rows of W₀ + s B A, held constant in the backward pass; m trains.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import dense_weight, is_packed, linear_shape, uniform
from dora_cli.adapters.lora import Lora, LoraLayer


class WeightDecomposedLayer(LoraLayer):
    """LoRA's factors, and ``magnitude`` (d_out,), which stays when the last component goes.

    The norms are those of the factors as they are: what is silenced, removed, added or masked counts at once.
    """

    removable = False
    adds = False
    squares: Tensor
    no_decay = frozenset({"magnitude"})

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__(base, a, b, None, scale, dropout)
        squares = dense_weight(base).square().sum(dim=1)
        self.register_buffer("squares", squares, persistent=False)  # (d_out,) ‖w_k‖², of weights that never change
        self.magnitude = nn.Parameter(squares.sqrt())

    def updated(self, x: Tensor, out: Tensor) -> Tensor:
        """out + (m/n − 1) ⊙ W₀x + (m/n) ⊙ sBAx: the bias is never scaled, and at the start nothing is added.

        With dropout the whole change sees the same dropped input, so W₀x is computed once more, as PEFT does.
        """
        inputs = self.adapter_input(x)
        if self.training and self.dropout > 0:
            plain = self._product(inputs)
        else:
            plain = out if self.bias is None else out - self.bias
        ratio = _ratio(self.magnitude, self.norms())
        change = (ratio - 1) * plain
        if self.rank:
            change = change + ratio * self.update(inputs)
        return out + change.to(out.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """W₀x."""
        if is_packed(self.base_layer):  # which unpacks for one product at a time, and keeps nothing for backward
            out: Tensor = self.base_layer(x)
            return out if self.bias is None else out - self.bias
        weight = self.weight.T if self.transposed else self.weight
        return nn.functional.linear(x.to(weight.dtype), weight)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """(d_out,) norms of the rows of W₀ + sBA, which is not formed: ‖w_k‖² + 2 b_k·(A w_k) + b_k·(AAᵀ b_k)."""
        with torch.autocast(self.a.device.type, enabled=False):
            a, b = self.a, self.b * self.factor()
            if is_packed(self.base_layer):
                weight = dense_weight(self.base_layer)
            else:
                weight = self.weight.T if self.transposed else self.weight
            projected = weight.to(a.dtype) @ a.T  # (d_out, r), as much work as BA, less memory
            squares = self.squares + (b * (2 * projected + b @ (a @ a.T))).sum(dim=1)
            return squares.clamp_min(0).sqrt()

    def delta_weight(self) -> Tensor:
        weight = dense_weight(self.base_layer)
        direction = weight + super().delta_weight()
        return _ratio(self.magnitude.detach(), direction.norm(dim=1))[:, None] * direction - weight

    def load_low_rank(self, a: Tensor, b: Tensor) -> None:
        """Start from a trained pair: W' is W₀ + BA, so its rows' norms are the magnitudes to start with."""
        super().load_low_rank(a, b)
        self.load_magnitude(self.norms())

    def load_magnitude(self, magnitude: Tensor) -> None:
        """Take ``magnitude`` (d_out,) as m."""
        with torch.no_grad():
            self.magnitude.copy_(magnitude)


@dataclass
class WeightDecomposed(Lora):
    """LoRA's start, and m = ‖W₀‖ by rows: the identity, exactly (METHODS 4)."""

    export: ClassVar[str] = "decomposed"

    def layer(self, base: nn.Module, rank: int) -> WeightDecomposedLayer:
        d_out, d_in = linear_shape(base)
        a = uniform(rank, d_in, d_in**-0.5, base.weight)  # type: ignore[arg-type]
        b = torch.zeros(d_out, rank, device=a.device)
        return WeightDecomposedLayer(base, a, b, self.scale(rank), self.dropout)


def _ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / n, and 0 for rows of zeros, in the gradient too: they have no direction to scale."""
    return magnitude / torch.where(norms > 0, norms, torch.inf)
