"""Which rows are named where a step is skipped: by their number in the split, also where rows were left out of it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_cli.data.encoded import Encoded
from dora_cli.data.streaming import Block
from dora_cli.errors import UserError
from dora_cli.training import loop


def test_rows_are_named_by_their_places_in_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Encoded({}, torch.arange(5), {}, {}, places=[1, 4, 6, 9])  # of ten rows, four had anything to learn
    monkeypatch.setattr(loop, "_loss_of", lambda session, encoded, row: float("nan") if row == 2 else 1.0)
    rows: Any = SimpleNamespace(where=lambda role, row: f"{role}.jsonl, line {row + 1}")
    block = Block(rows, encoded)
    session: Any = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(max_skipped=1), data=SimpleNamespace(packing=False)),
        rows_of=lambda step: [(block, 3), (block, 2)],
    )
    records: list[dict[str, Any]] = []
    hooks: Any = SimpleNamespace(skipped=records.append)
    progress: Any = SimpleNamespace(skipped=0)
    loop._blame(session, progress, hooks, 5, float("nan"))
    assert (records[0]["rows"], records[0]["guilty"]) == ([9, 6], [6])
    with pytest.raises(UserError, match="not finite at step 6") as caught:
        loop._blame(session, progress, hooks, 6, float("nan"))
    assert "by themselves: 6 (from 0)" in str(caught.value.where) and "line 7" in str(caught.value.where)
