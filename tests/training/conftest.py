"""The real command, on the tiny model and data of tests/conftest.py."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def dora_train(model_dir: Path, data_dir: Path, tmp_path: Path, remember_compositions: None) -> Callable[..., int]:
    """Run the real command in this process on the tiny model and data; returns its exit code."""
    from dora_cli.cli.train import main

    def run(*overrides: str, **options: Any) -> int:
        defaults = {
            "model.name": str(model_dir),
            "data.path": str(data_dir),
            "data.max_length": 16,
            "train.batch_size": 8,
            "train.epochs": 5,
            "train.learning_rate": 0.01,
            "out": str(tmp_path / "run"),
        }
        given = {word.split("=", 1)[0] for word in overrides}
        words = [f"{key}={value}" for key, value in defaults.items() if key not in given]
        if "recipe" not in given:
            words.insert(0, "recipe=text_classification")
        return main([*words, *overrides])

    return run


@pytest.fixture
def unplugged(
    dora_train: Callable[..., int], unplugged_at: Callable[[int], AbstractContextManager[None]]
) -> Callable[..., None]:
    """Run the command until the checkpoint at a step is written, and pull the plug there."""

    def run(step: int, *overrides: str) -> None:
        with unplugged_at(step):
            dora_train(*overrides)

    return run
