"""IncreLoRA through the real command: the plan, growth to the budget, export, exact resume."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.allocation.importance.module_sensitivity import ModuleSensitivity
from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge

Train = Callable[..., int]
# 40 steps; growth from step 4 on, the final choice at 20; 12 modules
WORDS = ["method=increlora", "budget=r3", "train.max_steps=40", "schedule.start=0.1", "schedule.end=0.5"]
WORDS += ["allocator.interval=4", "train.log_every=4", "train.eval_every=10"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def test_the_plan_says_how_it_grows(dora_train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert dora_train(*WORDS, "allocator.start_rank=2", "dry_run=true") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "24 components" in text and "(rank 2)" in text  # spares are not counted
    assert re.search(r"36 components, [\d,]+ (to [\d,]+ )?parameters \(budget=r3\)", text)
    assert "24 → 27 → 30 → 33 → 36 after the events at steps 4, 8, 12, 16, 20" in text
    assert dora_train(*WORDS, "train.warmup=0.5", "dry_run=true") == 0
    assert "growth starts at step 8, before the learning rate is warm" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["allocator.spares=3", "adapter=components", "importance=component_norm", "regularizer=dem"],
        ["adapter=lora", "importance=sensitivity", "regularizer=none", "schedule=cosine"],
    ],
    ids=" ".join,
)
def test_growth_ends_on_the_budget_and_eval_and_merge_agree(
    options: list[str], dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_train(*WORDS, *options, "train.max_steps=60") == 0
    text = capsys.readouterr().out
    run, merged = tmp_path / "run", tmp_path / "merged"
    summary, events = read(run / "summary.json"), read(run / "ranks.json")
    assert summary["budget"] | {"params_start": 0, "params_end": 0} == {
        "requested": "r3",
        "components_start": 12,
        "components_end": 36,
        "params_start": 0,
        "params_end": 0,
    }
    assert "36 grown from 12 components" in text
    assert "alive 36/36" in text and "alive 12/36" in text
    assert sum(summary["ranks"].values()) == 36
    alive = [event["alive"] for event in events]
    assert alive == sorted(alive) == [event["budget"] for event in events]
    assert alive[-1] == 36
    assert "best" in summary and summary["best"]["step"] >= 30  # only evaluations on budget count
    shapes = {name: tensor.shape for name, tensor in adapter_of(run).items() if "lora_A" in name}
    assert sum(shape[0] for shape in shapes.values()) == 36  # no spare is exported
    state = load_file(run / "adapter/method_state.safetensors")
    assert int(state["alive"].sum()) == 36
    losses = [
        record["loss"]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["split"] == "train"
    ]
    assert losses[-1] < losses[0]

    assert dora_merge([f"checkpoint={run}", f"out={merged}"]) == 0
    for checkpoint, extra in ((run, []), (merged, [f"recipe={run}/config.yaml"])):
        out = tmp_path / f"eval-{checkpoint.name}"
        assert dora_eval([f"checkpoint={checkpoint}", f"out={out}", *extra]) == 0
        metrics = read(out / "eval-validation.json")["metrics"]
        assert metrics["loss"] == pytest.approx(summary["metrics"]["validation"]["loss"], abs=1e-5)


def test_a_budget_of_parameters_is_met_from_below(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train(*WORDS, "budget=1500") == 0
    budget = read(tmp_path / "run/summary.json")["budget"]
    assert 1500 - 32 < budget["params_end"] <= 1500  # the cheapest component has 32


def test_what_growth_cannot_reach_is_refused(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["budget=0.5", "adapter.rank=2"], "budget=0.5 is no more than the adapter starts with"),
        (["budget=r2", "allocator.start_rank=3"], "is no more than the adapter starts with (allocator.start_rank=3)"),
        (["budget=400"], "budget=400 is no more than the adapter starts with"),
        (["budget=r17"], "204 components, more than these 12 modules can use"),
        (["adapter=lora", "allocator.spares=2", "regularizer=none"], "allocator.spares=0"),
    ):
        assert dora_train(*WORDS, *words) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ([], 6),  # between two events, with spares in training
        pytest.param(
            ["importance=sensitivity", "allocator.spares=2", "allocator.per_module=1"], 9, marks=pytest.mark.slow
        ),
        pytest.param(["adapter=lora", "regularizer=none", "train.accumulation=2"], 9, marks=pytest.mark.slow),
    ],
)
def test_resuming_in_the_middle_gives_the_same_bits(
    options: list[str], step: int, dora_train: Train, tmp_path: Path, unplugged: Callable[..., None]
) -> None:
    words = [*WORDS, *options, "train.save_every=3"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(step, *words, f"out={tmp_path}/cut")
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    assert read(tmp_path / "whole/ranks.json") == read(tmp_path / "cut/ranks.json")
    one, two = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resume_that_had_lost_the_scores_would_be_noticed(
    dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unplugged: Callable[..., None]
) -> None:
    words = [*WORDS, "train.save_every=3"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(6, *words, f"out={tmp_path}/cut")
    monkeypatch.setattr(ModuleSensitivity, "load_state_dict", lambda self, state: None)
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    assert read(tmp_path / "whole/ranks.json") != read(tmp_path / "cut/ranks.json")


def test_recomputed_activations_change_no_choice(dora_train: Train, tmp_path: Path) -> None:
    words = [*WORDS, "train.max_steps=20"]
    assert dora_train(*words, f"out={tmp_path}/plain") == 0
    assert dora_train(*words, "train.gradient_checkpointing=true", f"out={tmp_path}/again") == 0
    assert read(tmp_path / "plain/ranks.json") == read(tmp_path / "again/ranks.json")
