"""What dora-eval says where it has nothing to measure."""

from pathlib import Path

import pytest

from dora_cli.cli.eval import main


@pytest.mark.parametrize("name", ["nowhere", "runs/nowhere", "größe mit raum/lauf 1", "a/b/c", "/no/where"])
@pytest.mark.parametrize("more", [[], ["recipe=glue_sst2"]])
def test_a_folder_that_is_not_there(
    name: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"checkpoint={name}", "offline=true", *more]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if not more or name != "runs/nowhere":  # OWNER/NAME with a recipe may be a model of the hub: data comes first
        assert f"checkpoint={name}: no such folder" in said
        assert str(tmp_path / name) in said.replace("\n", "")


def test_a_model_does_not_say_what_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert main(["checkpoint=model"]) == 2
    assert "does not say which task and data it is for" in capsys.readouterr().err


def test_a_run_that_has_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    assert main(["checkpoint=run"]) == 2
    assert "without a result yet" in capsys.readouterr().err
