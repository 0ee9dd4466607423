"""Orthonormal directions under closed gates: rows of A and columns of B orthonormal, c = 0 (the toolkit's own).

AdaLoRA's regularizer (Zhang et al., ICLR 2023, arXiv 2303.10512, eq. 4) takes its small random P and Q there in some
tens of steps. A start from there has λ's whole gradient, and directions that turn slowly, from the first step.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dora_cli.adapters.init.base import Init


@dataclass
class OrthogonalStart(Init):
    """The identity; from here on a component of the update is as long as its gate times the scale."""

    needs: ClassVar[frozenset[str]] = frozenset({"gates", "directions"})

    def fill(self, name: str, layer: Any) -> None:
        """Draw A (r, d_in) and B (d_out, r) on the CPU, so that every device starts from the same.

        With more components than d_in (d_out) A's columns (B's rows) are orthonormal instead.
        """
        rows, columns = (torch.nn.init.orthogonal_(torch.empty(f.shape)) for f in (layer.a, layer.b))
        with torch.no_grad():
            layer.a.copy_(rows)
            layer.b.copy_(columns)
            layer.c.zero_()
