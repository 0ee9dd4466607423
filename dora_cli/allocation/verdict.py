"""Whether a step is taken: only where its loss and gradients are finite. What is no number never reaches a state."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """Where the host would have to wait for the answer, it stays on the device.

    Attributes:
        known: True or False where the host knows, None where only the device does.
        finite: () bool on the device, where the host does not know.
    """

    known: bool | None = True
    finite: Tensor | None = None

    @classmethod
    def of(cls, number: Tensor) -> "Verdict":
        """On a step whose loss plus gradient norm is ``number``, ()."""
        if waits(number.device):
            return cls(None, torch.isfinite(number))
        return cls(math.isfinite(number))

    def choose(self, new: Tensor, old: Tensor | float) -> Tensor:
        """``new`` where the step is taken, else ``old``, to the bit, whatever ``new`` holds."""
        if self.known is None:
            assert self.finite is not None
            return torch.where(self.finite, new, old)
        if self.known:
            return new
        return old if isinstance(old, Tensor) else torch.full_like(new, old)

    @property
    def taken(self) -> Tensor | float:
        """1.0 or 0.0, as a number or on the device."""
        if self.known is None:
            assert self.finite is not None
            return self.finite.float()
        return float(self.known)


TAKEN = Verdict()


def waits(device: torch.device) -> bool:
    """Whether reading a number makes the host wait for work that is still queued, and AdamW can skip without that."""
    return device.type == "cuda"
