"""Running the benchmark scripts in this process."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a script by its name; they find each other as they do when they are started."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module
