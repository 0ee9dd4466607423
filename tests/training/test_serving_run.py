"""What a run says of its adapter, and writes into its card."""

from collections.abc import Callable

import pytest


def test_a_head_that_no_server_takes_is_told_at_the_end(
    dora_train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_train("export=uniform", "budget=0.5", "adapter.rank=4", "train.max_steps=4") == 0
    told = capsys.readouterr().out
    assert "would refuse this one, or serve it wrong:\n  classifier was trained in full, beside the adapter" in told
