"""The plan in numbers, against what the run does, and what it warns of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dora_cli.training import plan as planning
from dora_cli.training.facts import end_bounds

Train = Callable[..., int]


@pytest.fixture
def planned(dora_train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The object that ``dry_run=json`` prints; without memory, whose estimate takes seconds."""
    monkeypatch.setattr(planning, "_memory", lambda session: ({}, {}))

    def run(*overrides: str, **options: Any) -> dict[str, Any]:
        assert dora_train(*overrides, "dry_run=json", **options) == 0
        return json.loads(capsys.readouterr().out)

    return run


def keys(plan: dict[str, Any]) -> set[str]:
    return {warning["key"] for warning in plan["warnings"]}


def test_the_plan_says_what_the_run_then_does(
    planned: Callable, dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=dora", "budget=r1", "adapter.rank=2", "train.max_steps=30", "allocator.interval=3"]
    plan = planned(*words)
    assert not (tmp_path / "run").exists()
    assert dora_train(*words) == 0
    text = capsys.readouterr().out
    events = json.loads((tmp_path / "run/ranks.json").read_text())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert plan["schedule"]["events"] == [[event["step"], event["budget"]] for event in events]
    budget, adapter = summary["budget"], plan["adapter"]
    assert (adapter["units_start"], adapter["parameters_start"]) == (budget["components_start"], budget["params_start"])
    assert adapter["units_end"] == [budget["components_end"]] * 2
    assert adapter["parameters_end"][0] <= budget["params_end"] <= adapter["parameters_end"][1]
    assert adapter["trained_start"] == budget["params_start"] + summary["head_params"] + adapter["units_start"]  # gates
    assert sorted(name for group in plan["modules"] for name in group["names"]) == sorted(summary["ranks"])
    assert sum(sum(group["parameters"]) for group in plan["modules"]) == budget["params_start"]
    assert plan["training"]["steps"] == summary["train"]["steps"] == 30
    assert len(plan["examples"]) == 2
    assert "final choice: 12 units alive in" in text

    log = (tmp_path / "run/train.log").read_text()
    assert log.startswith("run\nrecipe") and "plot" in log and "next " in log and "\033" not in log
    assert max(map(len, log.splitlines())) <= 80 or str(tmp_path) in log


def test_bounds_of_the_end_are_those_of_the_cheapest_and_the_dearest() -> None:
    costs = [10, 10, 30, 30]
    assert end_bounds(3, costs, by_cost=False, grows=False) == ([3, 3], [50, 70])
    assert end_bounds(6, costs, by_cost=False, grows=True) == ([6, 6], [60, 180])
    units, parameters = end_bounds(65, costs, by_cost=True, grows=False)
    assert parameters == [36, 65] and units == [2, 6]


def test_a_sound_plan_warns_of_nothing(planned: Callable) -> None:
    plan = planned("method=dora", "budget=r2", "adapter.rank=4", "train.max_steps=60", "allocator.interval=5")
    assert plan["warnings"] == []


@pytest.mark.parametrize(
    ("words", "key", "what", "advice"),
    [
        (["schedule.end=58"], "schedule.end", "step 58 of 60", "schedule.end=0.5"),
        (["budget=0.1"], "budget", "5 components for 12 modules, so 7", "budget=r1"),
        (["train.learning_rate=1"], "train.learning_rate", "5e-05 to 0.01", "try"),
        (["data=text", "train.learning_rate=1e-5"], "train.learning_rate", "1/", "set train.learning_rate="),
        (["train.warmup=100"], "train.warmup", "100 steps is no shorter than the run, 60", "train.warmup=0.06"),
        (["train.warmup=20"], "schedule.start", "pruning starts at step 9", "raise schedule.start"),
        (["allocator.interval=40"], "allocator.interval", "one allocation event", "allocator.interval=2"),
        (["train.eval_every=1", "train.batch_size=1"], "train.eval_every", "60 evaluations", "raise train.eval_every"),
        (["train.save_every=1"], "train.save_every", "60 in all", "raise train.save_every"),
        (["data.max_length=3"], "data.max_length", "are longer than data.max_length=3", "raise data.max_length"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_likely_wrong_is_said_with_numbers_and_what_to_set(
    words: list[str], key: str, what: str, advice: str, planned: Callable
) -> None:
    base = {"method": "dora", "budget": "r2", "adapter.rank": "4", "train.max_steps": "60", "allocator.interval": "5"}
    given = dict(word.split("=", 1) for word in words)
    plan = planned(*(f"{k}={v}" for k, v in (base | given).items()))
    found = [warning for warning in plan["warnings"] if warning["key"] == key]
    assert found and what in found[0]["what"] and advice in found[0]["advice"], plan["warnings"]


def test_a_mistake_leaves_stdout_empty(dora_train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert dora_train("method=dora", "budget=r9", "adapter.rank=2", "dry_run=json") == 2
    assert dora_train("method=dora", "budget=r1", "dry_run=jsn") == 2
    assert capsys.readouterr().out == ""
