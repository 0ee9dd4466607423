"""report.html: what stands in it is what the run's files say, and it needs nothing but itself."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dora_cli.errors import UserError
from dora_cli.reporting.rank_map import arrange, short_heads, short_tails
from dora_cli.reporting.report import write_report
from dora_cli.reporting.runs import read_run

MakeRun = Callable[..., Path]
END_LINE = "stroke-dasharray: 4,3;"  # of the final choice


class Page(HTMLParser):
    """The page's text, its links to elsewhere, and the cells of its rank map."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.links, self.cells, self.ids = "", list[str](), dict[str, str](), list[str]()
        self._cell: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]
        self.ids += [v for k, v in attributes if k == "id" and v]
        self._cell = found.get("title") if tag == "td" and "data-module" in found else None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self.cells[self._cell] = data.strip()
            self._cell = None


def page_of(folder: Path) -> tuple[str, Page]:
    write_report(read_run(folder), folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.mark.pages
def test_the_page_says_what_the_files_say_and_needs_nothing_else(make_run: MakeRun) -> None:
    folder = make_run()
    text, page = page_of(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert page.cells == {name: str(rank) for name, rank in summary["ranks"].items()}
    for word in ("toy · dora · budget 0.25 · seed 1", "0.8", "at step 40", "600", "7,200", "tiny & <small>"):
        assert word in page.text, word
    assert "dora-train recipe=toy budget=0.25 seed=1" in page.text, "the command that started it"
    frames = json.loads(re.search(r'id="frames">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert [sum(f["ranks"]) for f in frames] == [45, 27, 9, 9]
    assert frames[0]["label"].startswith("step 10: 45 alive")
    assert "to the final choice, after which" in page.text and "step 30, the final choice: the worst" in page.text
    assert text.count(END_LINE) == 6, "three charts in two widths"
    assert not page.links
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    # Matplotlib numbers its groups in each drawing anew, but nothing refers to them.
    assert all(page.ids.count(name) == 1 for name in ("step", "play", "frame", "frames", "ranks"))
    referred = set(re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', text))
    assert all(page.ids.count(a or b) == 1 for a, b in referred)


@pytest.mark.pages
def test_an_unfinished_run_and_one_without_events_have_a_page_too(make_run: MakeRun) -> None:
    text, page = page_of(make_run("half", finished=False))
    assert "unfinished" in page.text and "20 steps so far" in page.text
    assert "to the last event so far." in page.text and "step 20, the last event so far: the worst" in page.text
    assert "final choice" not in page.text and END_LINE not in text
    folder = make_run("static", method="lora")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in lines if r["split"] != "allocation"), encoding="utf-8"
    )
    text, page = page_of(folder)
    assert "How close it was" not in page.text and len(page.cells) == 9
    assert 'id="step"' in text, "one frame: the end"
    empty = make_run("empty", finished=False)
    (empty / "metrics.jsonl").write_text("")
    assert "0 steps so far" in page_of(empty)[1].text


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "- a", "config.yaml is damaged"),
        ("summary.json", "{", "summary.json is damaged"),
        ("summary.json", '{"budget": {}, "train": {}, "ranks": []}', "summary.json is damaged"),
    ],
)
def test_a_damaged_run_is_named(make_run: MakeRun, file: str, content: str, words: str) -> None:
    folder = make_run()
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(words)):
        read_run(folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        read_run(tmp_path)


def test_modules_are_laid_out_by_layer_and_kind() -> None:
    names = ["m.h.0.attn.q", "m.h.0.mlp.up", "m.h.1.attn.q", "m.pooler.dense"]
    grid = arrange(names)
    assert grid.columns == ["q", "up", "dense"]
    assert grid.rows == ["h.0", "h.1", "pooler"]
    assert grid.cells == [[*names[:2], None], [names[2], None, None], [None, None, names[3]]]
    assert short_tails(["attention.output.dense", "output.dense", "x.dense"]) == [
        "attention.output.dense",
        "output.dense",
        "x.dense",
    ]
    assert short_heads(["a.b.0", "a.b.1"]) == ["0", "1"] and short_heads(["a.b.0"]) == ["0"]


@pytest.mark.pages
def test_a_real_run_ends_with_its_page(run_tiny: Callable[..., Path], data_dir: Path) -> None:
    folder = run_tiny("method=dora", "budget=0.25", "adapter.rank=4", f"data.path={data_dir / 'train.jsonl'}")
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text())
    ranks: dict[str, Any] = summary["ranks"]
    assert summary["held_out"] == round(0.1 * len((data_dir / "train.jsonl").read_text().splitlines()))
    assert "to the final choice" in page.text
    assert page.cells == {name: str(rank) for name, rank in ranks.items()}
    assert "save.report" not in page.text.split("The whole configuration")[0]
