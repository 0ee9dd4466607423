"""The bench of packed bases, at a tiny shape."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
@pytest.mark.filterwarnings("ignore")
def test_a_base_that_was_built_packed_trains(bench: Callable[[str], Any], tmp_path: Path) -> None:
    words = ["--model", "tiny-llama", "--batch", "2", "--length", "8", "--steps", "3", "--json", str(tmp_path / "it")]
    found = bench("quantised").main([*words, "--checkpointing"])
    assert found["base_bytes"] < 1.5 * found["weights"]  # embeddings and head are in float32
    assert found["losses"][-1] < found["losses"][0]
    assert (tmp_path / "it").exists()
