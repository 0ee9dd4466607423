"""The options of an adapter, and what it declares: units, verbs, what it provides, and how it is saved.

A part is a dataclass whose fields are the keys ``adapter.*``; its ``layer(base, rank)`` wraps one linear layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from dora_cli.adapters.base import AdapterLayer
from dora_cli.adapters.dropout import Masks, attach
from dora_cli.adapters.init.base import Init, build_init
from dora_cli.errors import UserError


@dataclass
class AdapterPart:
    """What every adapter declares.

    ``units`` names the kinds of unit it offers, its own kind first; ``verbs`` what may be done with its own kind
    (modules can always be silenced, restored, frozen and thawed); ``provides`` what other parts may rest on (``rows``
    of A in the input's space, ``directions``: columns of B in the output's, too, both used as they are, ``gates``,
    ``gate_probability``); ``min_rank`` how many components a module cannot do
    without; ``budgeted`` whether a budget applies; ``wraps`` whether layers are wrapped; ``export`` how it is saved:
    as a ``lora`` pair, a ``decomposed`` one, a ``square``, or whole parameters (``full``); ``no_packed_base`` why the
    base's weights can't be packed (quantised), empty where they can.
    """

    units: ClassVar[tuple[str, ...]] = ("none",)
    verbs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    min_rank: ClassVar[int] = 0
    budgeted: ClassVar[bool] = True
    wraps: ClassVar[bool] = True
    export: ClassVar[str] = "lora"
    no_packed_base: ClassVar[str] = ""
    size_word: ClassVar[str] = "rank"  # what the size of a module's update is called

    def unfreeze(self, model: nn.Module, heads: Sequence[str] = ()) -> None:
        """Make those of the base's own parameters train that this method trains; the others are frozen already.

        ``heads`` names the modules that are trained in full in any case.
        """

    def unit_cost(self, d_out: int, d_in: int) -> int:
        """Parameters that one component of a (d_out, d_in) module costs under the budget."""
        return d_in + d_out

    def masks(self, layers: Mapping[str, AdapterLayer], seed: int) -> Masks | None:
        """Give the layers the dropout masks of a run; None where nothing is dropped."""
        shared = getattr(self, "shared_dropout", False)
        return attach(layers, getattr(self, "dropout", 0.0), seed, shared=shared)

    def layer(self, base: nn.Module, rank: int) -> AdapterLayer:
        """Wrap ``base`` (a linear layer) with an update of ``rank`` components."""
        raise NotImplementedError


RANK_HELP = "components per module at the start; null: allocator.start_ratio (1.5) × the average"
ALPHA_HELP = "scale is alpha / start rank; null: the start rank, a scale of 1"
SHARED_HELP = "modules that read the same input (q, k, v; gate, up) drop the same entries of it"
INIT_HELP = "where the factors start: the adapter's own way, eva, lora, open_gates, or orthogonal"
TARGETS_HELP = "modules to adapt: null (the transformer layers' linears), list, suffix, regex"


@dataclass
class RankedPart(AdapterPart):
    """Options of every adapter that has a rank. ``init`` is one of ``INITS``, the null ``init_*`` are its options."""

    rank: int | None = field(default=None, metadata={"help": RANK_HELP, "low": 1})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input", "low": 0.0, "below": 1.0})
    shared_dropout: bool = field(default=True, metadata={"help": SHARED_HELP})
    targets: Any = field(default=None, metadata={"help": TARGETS_HELP})
    init: str = field(default="default", metadata={"help": INIT_HELP})
    init_rho: float | None = field(
        default=None, metadata={"help": "eva: candidates per module are rho · rank; 1 moves no ranks", "low": 1.0}
    )
    init_tolerance: float | None = field(
        default=None, metadata={"help": "eva: cosine at which a component counts as found", "above": 0.0, "high": 1.0}
    )
    init_whiten: bool | None = field(default=None, metadata={"help": "eva: divide directions by √singular value"})

    provides: ClassVar[frozenset[str]] = frozenset({"rows"})

    def __post_init__(self) -> None:
        self.start()  # refuses what does not go together

    def start(self) -> Init | None:
        """The initialisation, with its options; None for the adapter's own.

        Raises:
            UserError: an unknown one, or an option that it does not read.
        """
        options = {k: v for k in ("rho", "tolerance", "whiten") if (v := getattr(self, f"init_{k}")) is not None}
        return build_init(self.init, options)


@dataclass
class LowRankPart(RankedPart):
    """Options that every sum of components reads."""

    alpha: float | None = field(default=None, metadata={"help": ALPHA_HELP, "above": 0.0})
    init_from: str | None = field(default=None, metadata={"help": "run or adapter folder to start from"})

    units: ClassVar[tuple[str, ...]] = ("components", "modules")
    verbs: ClassVar[frozenset[str]] = frozenset({"silence", "drop", "grow"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is not None and self.init != "default":
            raise UserError(
                f"adapter.init_from={self.init_from} and adapter.init={self.init} both say where the factors start",
                hint="set one of them (adapter.init=default goes on from the folder)",
            )

    def scale(self, start_rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / max(start_rank, 1)
