"""What an importance declares and provides."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict

Probe = Callable[[Tensor], float]  # mask (n,) of the units that take part → loss on a fixed validation batch


class Importance:
    """Scores units; higher is worth more. Owns its smoothing.

    ``needs`` is a subset of {weights, gradients, probe}; ``units`` the kinds of unit it can score; ``sums`` says that
    it has ``partial_sums``; ``remembers`` that scores rest on what a unit was at earlier steps.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    units: ClassVar[frozenset[str]] = frozenset({"components"})
    sums: ClassVar[bool] = False
    remembers: ClassVar[bool] = True

    def attach(self, table: UnitTable) -> None:
        """Take hold of the table before the first step."""

    def update(self, table: UnitTable, step: int, verdict: Verdict = TAKEN) -> None:
        """Look at weights and gradients after an optimizer step, up to the final choice. No host transfer.

        Where the step was not taken, gradients may be no numbers, and state must stay what it was: ``verdict.choose``.
        """

    def partial_sums(self) -> list[Tensor]:
        """What was summed up over this process's part of a batch alone, float32: to be added up before ``update``."""
        return []

    def close_period(self, table: UnitTable) -> None:
        """An event has come: what is measured from one event to the next ends here. Before ``scores``."""

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        """(n,) float, on the CPU; at allocation events only, and once more for the file beside an adapter."""
        raise NotImplementedError

    def elements(self, table: UnitTable, probe: Probe | None) -> list[Tensor]:
        """Per unit the flat scores of its elements, whose mean is its score; one where only units are scored."""
        return list(self.scores(table, probe)[:, None])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class FlatScores(Importance):
    """An importance whose whole state is one smoothed score per unit, kept flat on the layers' device."""

    def attach(self, table: UnitTable) -> None:
        device = next(table.layers[0].parameters()).device if table.layers else torch.device("cpu")
        self.smoothed = torch.zeros(len(table), device=device)

    def _extended(self, table: UnitTable) -> Tensor:
        """The smoothed scores, with zeros for units born since."""
        born = len(table) - len(self.smoothed)
        if born:
            self.smoothed = torch.cat([self.smoothed, self.smoothed.new_zeros(born)])
        return self.smoothed

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        return self._extended(table).cpu()

    def state_dict(self) -> dict[str, Any]:
        return {"smoothed": self.smoothed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.smoothed = state["smoothed"].to(self.smoothed.device, copy=True)
