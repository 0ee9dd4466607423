"""``dora-report`` and what a sweep ends with: which folders are taken, what is written, what is refused."""

import csv
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from dora_cli.cli import report_run
from dora_cli.cli.folder_lists import split_list
from dora_cli.cli.report import main, parse
from dora_cli.cli.report_run import common_folder, find_runs
from dora_cli.cli.sweep import Job, Result, ending
from dora_cli.errors import UserError

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """Text of the row headings, links, and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.fetched, self.text = list[str](), list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "a":
            self.links.append(found.get("href") or "")
        self.fetched += [v for k, v in attributes if k == "src" and v]
        if tag == "link":
            self.fetched.append(str(found))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take a second; most of what a command does can be seen without."""
    monkeypatch.setattr(report_run, "write_comparison", lambda folder, *rest: (folder / "index.html").write_text("new"))


def test_the_comparison_of_eight_runs(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2, 3):
        make_run(f"s/d{seed}", seed=seed, value=0.8 + seed / 100)
        make_run(f"s/l{seed}", seed=seed, value=0.7, method="lora & <co>", params=400)
    make_run("s/d#4 50%", seed=4, finished=False)
    (make_run("s/full", method="full", budget=None, params=90_000) / "report.html").write_text("a page")
    assert main([f"runs={tmp_path}/s/*", f"out={tmp_path}/c"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^\* dora 0.25 +0.82\d* ± 0.010 +3 of 4 +600 ", out, re.MULTILINE), out
    assert re.search(r"^  lora & <co> 0.25 +0.7 ± 0 +3 +400 +-0.120 ± 0.010 ", out, re.MULTILINE), out
    assert max(len(line) for line in out.splitlines() if not line.startswith("page:")) <= 80
    names = {"index.html", "table.csv", "summary.csv", "table.md"}
    assert {*os.listdir(tmp_path / "c")} == names | {"quality.png", "curve-accuracy.png", "curve-loss.png"}
    assert all((tmp_path / "c" / f"{n}.png").read_bytes()[:4] == b"\x89PNG" for n in ("quality", "curve-loss"))

    text = (tmp_path / "c/index.html").read_text(encoding="utf-8")
    page = Page(text)
    for word in ("8 runs compared", "dora 0.25", "lora & <co> 0.25", "full", "3 of 4", "unfinished", "600", "90,000"):
        assert word in page.text, word
    assert not page.fetched and "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert {"../s/full/report.html", "../s/d1", "../s/d%234%2050%25"} <= {*page.links}
    assert all((tmp_path / "c" / unquote(link)).exists() for link in page.links)

    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "c/table.csv").open())}
    assert len(rows) == 8
    assert float(rows[f"{tmp_path}/s/d2"]["value"]) == pytest.approx(0.82)
    assert rows[f"{tmp_path}/s/d#4 50%"]["value"] == ""
    groups = {row["group"]: row for row in csv.DictReader((tmp_path / "c/summary.csv").open())}
    assert groups["dora 0.25"]["best"] == "True" and groups["dora 0.25"]["seeds"] == "1 2 3"
    assert float(groups["lora & <co> 0.25"]["difference"]) == pytest.approx(-0.12)
    assert float(groups["lora & <co> 0.25"]["difference_sd"]) == pytest.approx(0.01)
    assert "| **dora 0.25** | 0.820 ± 0.010 |" in (tmp_path / "c/table.md").read_text()


def test_runs_are_found_by_patterns_lists_and_folders(make_run: MakeRun, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b, c = (make_run(name) for name in ("s/budget=0.1,seed=1", "s/budget=0.1,seed=2", "t/deep/c"))
    (a / "checkpoints/step-1").mkdir(parents=True)
    (a / "checkpoints/step-1/config.yaml").write_text("seed: 1\n")
    (tmp_path / "s/notes").mkdir()
    (tmp_path / "s/comparison").mkdir()
    (tmp_path / "s/comparison/index.html").write_text("an earlier one")

    def found(*values: str) -> tuple[set[Path], list[str]]:
        runs, others = find_runs(values)
        assert len({run.resolve() for run in runs}) == len(runs)
        return {run.resolve() for run in runs}, [str(path) for path in others]

    assert found("s/*") == ({a, b}, ["s/notes"])
    assert found("s") == found("s/budget*") == found(str(tmp_path / "s")) == ({a, b}, [])
    assert found("**")[0] == {a, b, c}
    assert found("s/budget=0.1,seed=1,t/deep/c")[0] == {a, c}
    assert found("['s/budget=0.1,seed=2', t]")[0] == {b, c}
    assert found("s", "t/*")[0] == {a, b, c}
    assert split_list("s/budget=0.1,seed=*,t") == ["s/budget=0.1,seed=*", "t"]
    monkeypatch.chdir(c)
    assert found(".") == found("../../../t") == ({c}, [])
    assert common_folder(find_runs(["."])[0]) == c.parent, "not inside the run"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ([], "runs= is missing", "dora-report runs="),
        (["runs=r", "ou=x"], "unknown key 'ou'", "'out'"),
        (["runs/a", "runs/b"], "'runs/a' is no key=value", "quote the pattern"),
        (["runs=r", "out=a", "out=b"], "out is given twice", ""),
        (["runs=r,nowhere"], "runs=nowhere: there is no such folder", "runs/sweep/*"),
        (["runs=empty"], "runs=empty holds no run", "config.yaml"),
        (["runs=half"], "none of these runs is finished with a result", "resume=true"),
        (["runs=r", "out=mine"], "out=mine holds something that is no comparison", "empty out=DIR"),
        (["runs=r", "out=mine/file"], "out=mine/file is a file", ""),
        (["runs=r", "baseline=loar"], "baseline=loar is none of these runs", "dora"),
        (["runs=broken"], "none of these runs", ""),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(
    words, message, hint, make_run, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run("r")
    make_run("half", finished=False)
    (make_run("broken") / "summary.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and hint in error
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_left_out_is_said_and_a_comparison_is_replaced(
    make_run, tmp_path, monkeypatch, capsys, undrawn
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run("s/good")
    (make_run("s/broken") / "summary.json").write_text("{")
    (tmp_path / "s/notes").mkdir()
    assert main(["runs=s/*"]) == main(["runs=s/*"]) == 0
    out = capsys.readouterr().out
    assert out.count("note: 1 folder without a run skipped: s/notes\n") == 2
    assert "note: s/broken is left out: s/broken/summary.json is damaged" in out
    assert out.endswith("page: s/comparison/index.html\n")
    assert os.listdir("s/comparison") == ["index.html"]


def test_an_empty_value_is_none() -> None:
    assert parse(["runs=a", "out=", "baseline=null", "runs=b"]) == (["a", "b"], {"out": None, "baseline": None})
    with pytest.raises(UserError, match="runs= is missing"):
        parse(["runs="])


def test_a_sweep_ends_with_the_comparison_and_with_what_failed(make_run, tmp_path, monkeypatch, undrawn) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [make_run(f"s/seed={seed}", seed=seed, value=0.7 + seed / 10).relative_to(tmp_path) for seed in (1, 2)]
    results = [Result(Job(run.name, [], run), 0, "") for run in runs]
    failed = Result(Job("seed=3", [], Path("s/seed=3")), 1, "")
    lines = ending([*results, failed])
    assert lines[:3] == ["", "job     exit  metric", "seed=3     1"]
    assert any(re.match(r"\* dora 0.25 +0.850 ± 0.071 +2 +600", line) for line in lines)
    assert lines[-2:] == ["page: s/comparison/index.html", "folders: s"]
    Path("s/comparison/index.html").write_text("as it was")
    plans = [replace(result, action="plan") for result in results]
    assert ending(plans) == ["", "job     exit  metric", "seed=1     0", "seed=2     0", "folders: s"]
    assert Path("s/comparison/index.html").read_text() == "as it was", "a dry run writes nothing"

    def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(report_run, "write_comparison", fails)
    lines = ending([*results, failed])
    assert lines[:2] == ["", "no comparison: a bug"] and "seed=3     1" in lines and lines[-1] == "folders: s"
    assert json.loads((tmp_path / "s/seed=1/summary.json").read_text())
    assert (tmp_path / "s/comparison/index.html").read_text() == "as it was", "the earlier one is whole"
