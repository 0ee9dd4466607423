"""scripts/bench/methods.py: what is chosen, what is compared, and what is said of it."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

Bench = Callable[[str], Any]


def record(task: str, label: str, seed: int, score: float, *, rate: float = 1e-3, metric: str = "accuracy") -> Any:
    held = {metric: score, "loss": 1 - score}
    return {
        "budget": "1k",
        "task": task,
        "label": label,
        "seed": seed,
        "rate": rate,
        "metric": metric,
        "params": 1000,
        "seconds": 1.0,
        "validation": held,
        "test": held,
    }


def test_the_interval_is_student_s_over_paired_differences(bench: Bench) -> None:
    report = bench("methods_report")
    lora, other = [0.81, 0.79, 0.84], [0.83, 0.80, 0.85]
    records = [record("a", "lora", s, q) for s, q in enumerate(lora)] + [
        record("a", "own", s, q) for s, q in enumerate(other)
    ]
    (own,) = [e for e in report.compare(records, "lora") if e["task"] == "a" and e["label"] == "own"]
    paired = stats.ttest_rel(other, lora).confidence_interval(0.95)
    assert own["gain"] - own["half_width"] == pytest.approx(100 * paired.low)
    assert own["gain"] + own["half_width"] == pytest.approx(100 * paired.high)


def test_only_the_same_seed_of_the_same_task_is_paired(bench: Bench) -> None:
    report = bench("methods_report")
    records = [record("a", "lora", 1, 0.5), record("a", "own", 1, 0.6), record("a", "own", 2, 0.1)]
    records += [record("b", "own", 1, 0.9)]  # no baseline there
    entries = {(e["task"], e["label"]): e for e in report.compare(records, "lora")}
    assert entries["a", "own"]["gains"] == [pytest.approx(10)]
    assert "gain" not in entries["b", "own"]
    assert entries["all", "own"]["tasks"] == ["a"]


def test_over_tasks_every_task_counts_the_same(bench: Bench) -> None:
    report = bench("methods_report")
    records = [record("a", "lora", s, 0.5) for s in range(4)] + [record("a", "own", s, 0.6) for s in range(4)]
    records += [record("b", "lora", 0, 0.5), record("b", "own", 0, 0.4)]
    (whole,) = [e for e in report.compare(records, "lora") if e["task"] == "all"]
    assert whole["gain"] == pytest.approx(0)
    assert (whole["better"], whole["worse"], whole["pairs"]) == (4, 1, 5)


def test_a_lower_perplexity_is_a_gain(bench: Bench) -> None:
    report = bench("methods_report")
    records = [record("a", "lora", 1, 10.0, metric="perplexity"), record("a", "own", 1, 9.0, metric="perplexity")]
    entries = {(e["task"], e["label"]): e for e in report.compare(records, "lora")}
    assert entries["a", "own"]["gain"] == pytest.approx(10)  # percent less
    assert ("all", "own") not in entries  # points of accuracy and percents of perplexity have no mean


def test_the_rate_is_chosen_by_the_mean_over_seeds_on_validation(bench: Bench) -> None:
    methods = bench("methods")
    records = [record("a", "own", 1, 0.9, rate=1e-3), record("a", "own", 2, 0.5, rate=1e-3)]
    records += [record("a", "own", s, 0.8, rate=2e-3) for s in (1, 2)]
    assert methods.best_rates(records) == {("1k", "a", "own"): 2e-3}
    broken = [*records, record("a", "own", 1, 0.95, rate=4e-3)]  # its other seed diverged
    assert methods.best_rates(broken) == {("1k", "a", "own"): 2e-3}
    worse = [
        record("a", "own", 1, 9.0, rate=1e-3, metric="perplexity"),
        record("a", "own", 1, 8.0, metric="perplexity"),
    ]
    worse[1]["rate"] = 5e-4
    assert methods.best_rates(worse) == {("1k", "a", "own"): 5e-4}


def test_rows_that_choose_and_rows_that_are_reported_are_no_training_rows(bench: Bench, tmp_path: Path) -> None:
    methods = bench("methods")
    source = tmp_path / "glue" / "sst2"
    source.mkdir(parents=True)
    for split, n in (("train", 50), ("validation", 20)):
        lines = (json.dumps({"sentence": f"{split} {i}", "label": i % 2}) + "\n" for i in range(n))
        (source / f"{split}.jsonl").write_text("".join(lines))
    options = argparse.Namespace(out=tmp_path / "out", data=tmp_path, tasks=["sst2"], rows=45, dev=10, test=15)
    methods.prepare(options)
    rows = {r: (options.out / "data/sst2" / f"{r}.jsonl").read_text().splitlines() for r in ("train", "validation")}
    test = (options.out / "data/sst2/test.jsonl").read_text().splitlines()
    assert (len(rows["train"]), len(rows["validation"]), len(test)) == (40, 10, 15)
    assert not set(rows["train"]) & set(rows["validation"])
    assert all("validation " in row for row in test)


def test_the_table_and_the_files_hold_what_was_found(bench: Bench, tmp_path: Path, capsys: Any) -> None:
    report = bench("methods_report")
    records = [record("a", m, s, 0.5 + 0.1 * (m == "own")) for m in ("lora", "own") for s in (1, 2)]
    report.report(tmp_path, {"command": []}, [], {("1k", "a", "own"): 1e-3}, records, "lora")
    text = (tmp_path / "table.md").read_text()
    assert "| 1k | a (accuracy) | own | 0.001 | 1,000 | 60.00 | 0.00 | +10.00 ± 0.00 | 2 |" in text
    assert text in capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["reported"]) == 4 and content["chosen"][0]["rate"] == 1e-3
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_rate_that_is_given_belongs_to_a_label(bench: Bench) -> None:
    methods = bench("methods")
    options = argparse.Namespace(rate=["dora=2.5e-3", "lora qv=4e-4"])
    assert methods.given_rates(options, ["lora qv", "dora", "lora"]) == {"dora": 2.5e-3, "lora qv": 4e-4}
    with pytest.raises(SystemExit, match="names none of lora"):
        methods.given_rates(options, ["lora"])


def test_runs_at_a_rate_that_was_not_chosen_are_compared_with_nothing(bench: Bench, tmp_path: Path) -> None:
    compress = bench("compress")
    for name in ("lr0.001-s1", "lr0.0005-s1", "lr0.0005-s2"):
        folder = tmp_path / "runs/report/1k/a/lora" / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
    with pytest.raises(SystemExit, match="has several rates"):
        compress.runs_of(tmp_path, "1k", "a", "lora")
    chosen = [{"budget": "1k", "task": "a", "label": "lora", "rate": 0.0005}]
    (tmp_path / "results.json").write_text(json.dumps({"chosen": chosen}))
    runs = compress.runs_of(tmp_path, "1k", "a", "lora")
    assert {seed: run.name for seed, run in runs.items()} == {1: "lr0.0005-s1", 2: "lr0.0005-s2"}
    assert compress.runs_of(tmp_path, "2k", "a", "lora") == {}


def test_a_run_of_other_words_is_not_taken_for_this_one(bench: Bench, tmp_path: Path) -> None:
    methods = bench("methods")
    options = argparse.Namespace(out=tmp_path, device="cpu", epochs=3, batch=16, override=["model=minilm"])
    job = methods.Job(methods.REPORT, "1k", "sst2", "own", 1e-3, 1, ("method=dora_plus",))
    assert not methods.finished(job, options)
    folder = job.folder(tmp_path)
    folder.mkdir(parents=True)
    summary = {"last": {"name": "accuracy"}, "budget": {"params_end": 1, "params_start": 2}, "train": {"seconds": 1}}
    (folder / "summary.json").write_text(json.dumps({**summary, "metrics": {"validation": {}}}))
    Path(f"{folder}.words.json").write_text(json.dumps(job.argv(options)))
    assert methods.finished(job, options)
    options.epochs = 4
    with pytest.raises(SystemExit, match="other words"):
        methods.finished(job, options)
