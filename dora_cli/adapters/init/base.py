"""What an initialisation declares and does: it may look at data, move ranks between modules, and fill fresh layers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from dora_cli.adapters.init import INITS
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean, load

# For each batch of training data which positions (n, s) are real tokens, and a call that runs the model over it. Of an
# encoder-decoder there may be two such tables, of different shapes: of what is read, and of what is written.
Passes = Iterable[tuple[Tensor | Sequence[Tensor], Callable[[], object]]]


class Init:
    """``needs`` is what the adapter must provide (``gates``, ``rows``), ``looks`` whether data is looked at before."""

    needs: ClassVar[frozenset[str]] = frozenset()
    looks: ClassVar[bool] = False
    notes: Sequence[str] = ()  # what the user may want to know of the look

    def observe(
        self, model: nn.Module, names: Sequence[str], ranks: Sequence[int], costs: Sequence[int], passes: Passes
    ) -> list[int]:
        """Look at the inputs of the modules ``names`` of the bare model, and change nothing.

        Returns:
            Ranks per module that cost no more than ``ranks``, where a component of each module costs ``costs``.
        """
        return list(ranks)

    def fill(self, name: str, layer: Any) -> None:
        """Set the factors of a fresh layer (a ``LowRankLayer``)."""


def build_init(name: str, options: dict[str, Any]) -> Init | None:
    """The initialisation called ``name``, None for ``default``.

    Raises:
        UserError: unknown, or an option that it does not read.
    """
    if name != "default" and name not in INITS:
        raise UserError(f"adapter.init={name} is not known", hint=did_you_mean(name, ["default", *INITS]))
    kinds = {n: load(INITS, n, key="adapter.init") for n in ([name] if name != "default" else [])}
    known = {f.name for kind in kinds.values() for f in fields(cast(Any, kind))}
    for option, value in options.items():
        if option not in known:
            raise UserError(
                f"adapter.init_{option}={value}: adapter.init={name} does not read it",
                hint="init_rho, init_tolerance and init_whiten are read by adapter.init=eva",
            )
    return kinds[name](**options) if kinds else None
