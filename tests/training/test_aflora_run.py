"""AFLoRA through the real command: a resume that needs its scores, the count of what trains, both freezing rules."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.allocation.importance.freezing_score import FreezingScore

Train = Callable[..., int]
# 40 steps: freezing at every second one from 4 to 24, every projection may freeze
WORDS = ["method=aflora", "budget=r2", "train.max_steps=40", "adapter.freeze_square=false", "importance.window=4"]
WORDS += ["schedule.start=4", "schedule.end=24", "allocator.interval=2", "train.log_every=4", "train.eval_every=10"]
WORDS += ["train.save_every=5", "save.which=last", "schedule=linear"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], Any, Any]:
    summary = read(run / "summary.json")
    kept = {key: summary[key] for key in ("budget", "metrics", "trained_params_mean")}
    return load_file(run / "adapter/adapter_model.safetensors"), read(run / "ranks.json"), kept


def same(one: Path, two: Path) -> bool:
    (tensors, *rest), (tensors2, *rest2) = outcome(one), outcome(two)
    return (
        tensors.keys() == tensors2.keys()
        and rest == rest2
        and all(torch.equal(tensors[n], tensors2[n]) for n in tensors)
    )


@pytest.mark.parametrize("rule", ["exact", pytest.param("quantile", marks=pytest.mark.slow)])
def test_resuming_in_the_middle_gives_the_same_bits_and_needs_the_scores(
    rule: str, dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unplugged: Callable[..., None]
) -> None:
    """Step 10 lies in the middle of the freezing, and of a window of the gradient average."""
    words = [*WORDS, f"allocator.rule={rule}"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(10, *words, f"out={tmp_path}/kept")
    shutil.copytree(tmp_path / "kept", tmp_path / "lost")
    for name in ("kept", "lost"):
        with monkeypatch.context() as patch:
            if name == "lost":
                patch.setattr(FreezingScore, "load_state_dict", lambda self, state: None)
            assert dora_train(*words, f"out={tmp_path}/{name}", "resume=true") == 0
    assert same(tmp_path / "whole", tmp_path / "kept")
    assert not same(tmp_path / "whole", tmp_path / "lost"), "the scores make no difference: a test of nothing"


def test_the_summarys_mean_of_trained_parameters_is_the_hand_count(
    dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trains at a step is what had not frozen by the step before; the head trains throughout."""
    sizes: list[int] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(sum(p.numel() for group in self.param_groups for p in group["params"]))
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert dora_train(*WORDS, "adapter.targets=[intermediate.dense]") == 0
    run = tmp_path / "run"
    summary, events = read(run / "summary.json"), read(run / "ranks.json")
    a, b, vectors, head = 2 * 16, 32 * 2, 2 + 32, 16 * 2 + 2
    # two modules with two projections each; A and B differ in size, so count from the frozen flags of each event
    assert summary["head_params"] == head
    assert summary["trained_params"] == 2 * (a + b + vectors) + head
    assert sizes[0] == 2 * (a + b + vectors) + head
    assert sizes[-1] == 2 * vectors + head
    assert summary["trained_params_mean"] == round(sum(sizes) / 40)
    # tensors that train during step t: the count after the last event before it
    alive = {event["step"]: event["alive"] for event in events}
    training = 4
    for t in range(1, 41):
        low, high = 2 * vectors + head + training * min(a, b), 2 * vectors + head + training * max(a, b)
        assert low <= sizes[t - 1] <= high
        training = alive.get(t, training)
    assert training == 0


@pytest.mark.parametrize("rule", ["exact", "quantile"])
def test_the_count_follows_the_schedule_exactly_or_lags_behind_it(rule: str, dora_train: Train, tmp_path: Path) -> None:
    assert dora_train(*WORDS, f"allocator.rule={rule}") == 0
    events = read(tmp_path / "run/ranks.json")
    assert [event["step"] for event in events] == list(range(4, 25, 2))
    for event in events:
        assert event["budget"] == round(24 * (1 - (event["step"] - 4) / 20))
        if rule == "exact":
            assert event["alive"] == event["budget"]
    counts = [event["alive"] for event in events]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    if rule == "quantile":
        assert counts != [event["budget"] for event in events]


def test_an_unknown_rule_is_refused(dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dora_train("method=aflora", "budget=r2", "model.name=./nowhere", "allocator.rule=median") == 2
    text = capsys.readouterr().err
    assert "allocator.rule" in text
    assert "quantile" in text
    assert not (tmp_path / "run").exists()
