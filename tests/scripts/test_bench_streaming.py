"""The bench of large sets, on a small one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dora_cli.data import sources


def test_a_pass_reads_every_row_but_those_that_validate_a_buffer_at_a_time(
    bench: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = bench("streaming")
    monkeypatch.setattr(sources, "BUFFER", 64)
    script.write_set(tmp_path / "texts.jsonl", 600_000)
    script.write_model(tmp_path / "model")
    rows = len((tmp_path / "texts.jsonl").read_text().splitlines()) - 200
    script.one_pass(str(tmp_path / "texts.jsonl"), str(tmp_path / "model"))
    assert rows > 64 and f" batches of {-(-rows // 64)} buffers, " in capsys.readouterr().out
