"""The two ends of the scale: every weight trains (``full``), or none but the head (``none``). No budget applies."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass
class Full:
    """Full fine-tuning: no layers are wrapped, every parameter trains and is saved as it is."""

    units: ClassVar[str] = "none"
    verbs: ClassVar[frozenset[str]] = frozenset()
    budgeted: ClassVar[bool] = False
    wraps: ClassVar[bool] = False
    export: ClassVar[str] = "full"
    trains_base: ClassVar[bool] = True


@dataclass
class Frozen:
    """A trained head on the frozen base: the control that tells what an adapter adds."""

    units: ClassVar[str] = "none"
    verbs: ClassVar[frozenset[str]] = frozenset()
    budgeted: ClassVar[bool] = False
    wraps: ClassVar[bool] = False
    export: ClassVar[str] = "full"
    trains_base: ClassVar[bool] = False
