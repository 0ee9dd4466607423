"""The plan in numbers, against what the run does, and what it warns of."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_cli.cli.parts import load_parts
from dora_cli.config.compose import compose
from dora_cli.config.recipes import choices, recipes_dir
from dora_cli.errors import UserError
from dora_cli.training import plan as planning
from dora_cli.training.doubts import doubts
from dora_cli.training.facts import end_bounds, max_positions

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
    assert log.startswith("run\n  recipe") and "plot" in log and "next " in log and "\033" not in log
    assert max(map(len, log.splitlines())) <= 80 or str(tmp_path) in log


def test_bounds_of_the_end_are_those_of_the_cheapest_and_the_dearest() -> None:
    costs = [10, 10, 30, 30]
    assert end_bounds(3, costs, by_cost=False, grows=False) == ([3, 3], [50, 70])
    assert end_bounds(6, costs, by_cost=False, grows=True) == ([6, 6], [60, 180])
    units, parameters = end_bounds(65, costs, by_cost=True, grows=False)
    assert parameters == [36, 65] and units == [2, 4]


# A sound plan, as far as warnings look at it: each case changes what it names.
SOUND: dict[str, Any] = {
    "run": {"method": "dora", "parts": {"adapter": "components"}, "budget": "r2"},
    "data": {
        "choice": "mine",
        "max_length": 64,
        "splits": {
            "train": {"rows": 640, "batch_rows": 640, "truncated": 3},
            "validation": {"rows": 90, "batch_rows": 90, "truncated": 0},
        },
    },
    "model": {"max_positions": 512},
    "modules": [{"names": [f"layer.{i}.query" for i in range(12)]}],
    "adapter": {"unit": "components", "units_end": [24, 24]},
    "schedule": {
        "mode": "shrink",
        "counts": "components",
        "preset_start": False,
        "first": 48,
        "start": 9,
        "end": 30,
        "steps": 60,
        "interval": 10,
        "one_event": False,
        "events": [[9, 45], [19, 40], [29, 25], [30, 24]],
    },
    "training": {
        "steps": 60,
        "rows_per_step": 32,
        "learning_rate": 1e-3,
        "tuned_learning_rate": None,
        "warmup_steps": 4,
        "evaluate_every": 20,
        "save_every": 20,
    },
}


@pytest.mark.parametrize(
    ("changes", "key", "what", "advice"),
    [
        ({"schedule.end": 58}, "schedule.end", "step 58 of 60", "schedule.end=0.5"),
        ({"schedule.end": 58, "schedule.mode": "constant"}, None, "", ""),
        ({"adapter.units_end": [5, 5]}, "budget", "5 components for 12 modules, so 7", "budget=r1"),
        ({"training.learning_rate": 1.0}, "train.learning_rate", "5e-05 to 0.01", "try"),
        ({"training.learning_rate": 1e-3, "run.parts": {"adapter": "full"}}, "train.learning_rate", "0.0002", "try"),
        ({"training.tuned_learning_rate": 4e-3}, "train.learning_rate", "1/4 of the 0.004", "learning_rate=0.004"),
        ({"training.tuned_learning_rate": 2.5e-4}, "train.learning_rate", "4 times the 0.00025", "leave it out"),
        ({"training.tuned_learning_rate": 5e-4}, None, "", ""),
        (
            {"training.warmup_steps": 60, "schedule": None},
            "train.warmup",
            "60 steps is no shorter than the run, 60",
            "warmup=0.06",
        ),
        ({"training.warmup_steps": 20}, "schedule.start", "pruning starts at step 9", "raise schedule.start"),
        ({"training.warmup_steps": 20, "schedule.preset_start": True}, None, "", ""),
        ({"training.warmup_steps": 20, "schedule.mode": "static"}, "schedule.start", "allocation starts", "raise"),
        (
            {"training.warmup_steps": 20, "schedule.mode": "static", "schedule.counts": "tensors"},
            "schedule.start",
            "freezing starts at step 9",
            "raise",
        ),
        ({"training.warmup_steps": 19, "schedule.first": 45}, None, "", ""),  # the first event keeps all
        ({"training.warmup_steps": 20, "schedule.first": 45}, "schedule.start", "pruning starts at step 19", "raise"),
        ({"training.warmup_steps": 19, "schedule.first": 45, "schedule.mode": "constant"}, "schedule.start", "9,", ""),
        ({"schedule.events": [[30, 24]]}, "allocator.interval", "one allocation event", "allocator.interval=2"),
        ({"schedule.events": [[30, 24]], "schedule.start": 30}, "schedule.end", "step 30 alone", "further apart"),
        ({"training.steps": 1, "training.warmup_steps": 1, "schedule": None}, "train.warmup", "of 1 step is", "share"),
        ({"schedule.events": [[30, 24]], "schedule.one_event": True}, None, "", ""),
        ({"training.evaluate_every": 1, "training.rows_per_step": 4}, "train.eval_every", "60 evaluations", "raise"),
        (
            {"training.evaluate_every": 60, "training.rows_per_step": 1, "data.splits.validation.batch_rows": 900},
            "train.eval_every",
            "1 evaluation of 900 rows takes longer than the training, which sees 60 rows",
            "raise",
        ),
        ({"training.save_every": 1}, "train.save_every", "every step, 60 in all", "raise train.save_every"),
        ({"data.splits.train.truncated": 320}, "data.max_length", "320 of 640 training rows", "raise data.max_length"),
        ({"model.max_positions": 32}, "data.max_length", "more than the 32 positions", "set data.max_length=32"),
        ({"schedule": None}, None, "", ""),
    ],
    ids=str,
)
def test_what_is_likely_wrong_is_said_with_numbers_and_what_to_set(
    changes: dict[str, Any], key: str | None, what: str, advice: str
) -> None:
    assert doubts(SOUND) == []
    known = deepcopy(SOUND)
    for name, value in changes.items():
        *path, last = name.split(".")
        node = known
        for part in path:
            node = node[part]
        node[last] = value
    found = doubts(known)
    assert [doubt.key for doubt in found] == ([key] if key else [])
    assert not key or (what in found[0].what and advice in found[0].advice), found


def test_warnings_reach_the_plan_of_a_run_and_know_what_was_tuned(planned: Callable) -> None:
    plan = planned("method=dora", "data=text", "budget=r1", "adapter.rank=2", "train.learning_rate=0.1")
    assert keys(plan) == {"train.learning_rate"}
    assert plan["training"]["tuned_learning_rate"] == 0.002 and "data=text" in plan["warnings"][0]["what"]


def test_values_that_a_tuned_file_takes_from_another_are_known_too() -> None:
    for method, rate in (("rslora", 4e-4), ("adalora_official", 8e-4)):
        found = compose(["recipe=glue_cola", f"method={method}", "train.learning_rate=0.02"], load_parts())
        assert found.tuned["train.learning_rate"] == rate
        assert method != "rslora" or found.preset["adapter.scaling"] == "rank_stabilised"


@pytest.mark.parametrize(
    ("method", "steps"),
    [("aflora", 2000), ("dlora", 1000)]
    + [pytest.param(m, 1000, marks=pytest.mark.slow) for m in choices("method", [recipes_dir()])],
)
def test_the_schedule_of_a_preset_as_it_stands_is_no_mistake(planned: Callable, method: str, steps: int) -> None:
    words = f"method={method}", f"train.max_steps={steps}", "train.epochs=200", "train.learning_rate=0.001"
    assert not keys(planned(*words)) - {"train.learning_rate"}


@pytest.mark.parametrize(
    ("method", "budget"),
    [("elalora", "2k"), *(pytest.param("alora", budget, marks=pytest.mark.slow) for budget in ("r2", "2k", "r10"))],
)
def test_an_adapter_whose_units_move_ends_within_the_bounds(
    planned: Callable, dora_train: Train, tmp_path: Path, method: str, budget: str
) -> None:
    words = f"method={method}", f"budget={budget}", "train.max_steps=12", "allocator.interval=3"
    adapter = planned(*words)["adapter"]
    assert dora_train(*words) == 0
    end = json.loads((tmp_path / "run/summary.json").read_text())["budget"]
    for counted, here in (("units", end["components_end"]), ("parameters", end["params_end"])):
        least, most = adapter[f"{counted}_end"]
        assert least <= here <= most
    assert adapter["parameters_end"][0] < adapter["parameters_end"][1]


def test_the_longest_input_is_the_one_that_loading_allows() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

    small = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    roberta = RobertaModel(RobertaConfig(**small, intermediate_size=4, max_position_embeddings=18, pad_token_id=1))
    llama = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=4, max_position_embeddings=18))
    for model, longest in ((roberta, 16), (llama, 18)):
        assert max_positions(SimpleNamespace(model=model)) == longest


def test_a_mistake_leaves_stdout_empty(dora_train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert dora_train("method=dora", "budget=r9", "adapter.rank=2", "dry_run=json") == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ")
    for value in ("jsn", "1"):
        with pytest.raises(UserError, match=f"dry_run={value} is not") as refusal:
            compose(["recipe=quickstart", f"dry_run={value}"], load_parts())
        assert "false" in f"{refusal.value.message} {refusal.value.hint}"
