"""The examples of the documentation run, as they stand."""

import json
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.py"))


def test_they_are_found() -> None:
    assert [path.stem for path in EXAMPLES] == ["own_loop", "trainer"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_ends_on_budget(
    example: Path, model_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    out = tmp_path / "adapter"
    words = ["--model", str(model_dir), "--data", str(data_dir), "--out", str(out), "--epochs", "3"]
    if example.stem == "trainer":
        words += ["--checkpoints", str(tmp_path / "checkpoints")]
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", [str(example), *words])
    runpy.run_path(str(example), run_name="__main__")
    ranks = json.loads((out / "method.json").read_text())["ranks"]
    assert sum(ranks.values()) == 24 and len(ranks) == 12
