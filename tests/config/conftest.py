"""Small stand-ins: parts with a few options each, and a user's folder with a model, data and recipes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dora_cli.config.compose import Composed, compose
from dora_cli.errors import UserError


@dataclass
class Lora:
    rank: int | None = field(default=None, metadata={"low": 1})
    alpha: float | None = None
    dropout: float = field(default=0.0, metadata={"low": 0.0, "below": 1.0})
    shared_dropout: bool = True
    targets: Any = None
    init_from: str | None = None


@dataclass
class Components(Lora):
    decay_gates: bool = False


@dataclass
class Aflora:
    rank: int | None = None
    freeze_square: bool = True


@dataclass
class Nothing:
    pass


@dataclass
class Norm:
    beta: float = field(default=0.9, metadata={"low": 0.0, "below": 1.0})


@dataclass
class Sensitivity:
    beta: float = 0.85
    beta_uncertainty: float = 0.85


@dataclass
class Ablation:
    rows: int = 32


@dataclass
class Score:
    window: int = 10
    beta: float = 0.85
    beta_uncertainty: float = 0.95


@dataclass
class Cubic:
    start: int | float = 0.15
    end: int | float = 0.5

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise UserError(f"schedule.start={self.start} lies after schedule.end={self.end}")


@dataclass
class Power(Cubic):
    power: float = field(default=2.0, metadata={"above": 0.0})


@dataclass
class Prune:
    interval: int | float = 10
    revive: bool = True
    min_rank: int = 0


@dataclass
class Reallocate:
    rounds: int = 8


@dataclass
class Freeze:
    interval: int = 10


@dataclass
class Dem:
    weight: float = 0.3
    normaliser: str = field(default="code", metadata={"choices": ("code", "paper")})
    until: str = "end"


@dataclass
class Orthogonal:
    weight: float = 0.1
    squared: bool = False


PARTS: dict[str, dict[str, type]] = {
    "adapter": {
        "lora": Lora,
        "components": Components,
        "svd": Lora,
        "aflora": Aflora,
        "full": Nothing,
        "none": Nothing,
    },
    "importance": {
        "component_norm": Norm,
        "sensitivity": Sensitivity,
        "ablation": Ablation,
        "freezing_score": Score,
        "none": Nothing,
    },
    "schedule": {"cubic_late": Cubic, "cubic_early": Cubic, "power": Power, "constant": Nothing},
    "allocator": {
        "prune": Prune,
        "prune_official": Freeze,
        "prune_and_reallocate": Reallocate,
        "freeze": Freeze,
        "none": Nothing,
    },
    "regularizer": {"dem": Dem, "orthogonal": Orthogonal, "none": Nothing},
}

FILES = {
    "model/tiny.yaml": "# A tiny model.\nname: package://tiny/model\n",
    "data/toy.yaml": "# Toy data.\nname: toy\n",
    "data/glue/toy.yaml": "# Toy.\nname: glue\nconfig: toy\ncolumns:\n  text: sentence\n  label: label\n",
    "tuned/glue/toy/dora.yaml": """# @package _global_
# Values of this pair.
train:
  learning_rate: 8e-4
  epochs: 7
regularizer:
  weight: 0.5
""",
    "recipe/toy.yaml": """# @package _global_
# A toy.
defaults:
  - _self_
  - override /model: tiny
  - override /data: glue/toy
  - override /method: dora

budget: r8
train:
  epochs: 3
""",
}


@pytest.fixture
def parts() -> dict[str, dict[str, type]]:
    return PARTS


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder; the working directory is an empty one beside it."""
    folder = tmp_path / "library"
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


@pytest.fixture
def composed(library: Path) -> Callable[..., Composed]:
    """``composed("recipe=toy", "seed=2")`` with the stand-ins."""

    def run(*overrides: str) -> Composed:
        return compose(overrides, PARTS, [library])

    return run


@pytest.fixture
def refusal(composed: Callable[..., Composed]) -> Callable[..., UserError]:
    """The error of a composition that must fail."""

    def run(*overrides: str) -> UserError:
        with pytest.raises(UserError) as caught:
            composed(*overrides)
        return caught.value

    return run
