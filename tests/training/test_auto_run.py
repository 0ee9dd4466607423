"""``schedule=auto`` through the real command: what it says, keeps and records, and exact resume in a trial."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.trials import Trials
from dora_cli.api import adapt
from dora_cli.errors import UserError
from dora_cli.processes import World
from dora_cli.training import passes

Train = Callable[..., int]
# 12 modules of rank 4; events after steps 4, 6, … 20.
WORDS = ["schedule=auto", "adapter.rank=4", "train.max_steps=24", "schedule.start=4", "schedule.end=20"]
WORDS += ["allocator.interval=2", "schedule.rows=20", "train.eval_every=6", "train.log_every=4"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def records(run: Path, split: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["split"] == split]


@pytest.mark.pages
def test_a_run_finds_its_budget_and_says_how(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train.max_steps=40", "schedule.end=36", "train.learning_rate=0.05", "schedule.tolerance=0.002"]
    assert dora_train(*WORDS, *words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "found by the run: 1 to 48 components" in printed
    assert "if every cut is kept" in printed and "the loss on 20 validation rows stays within 0.002" in printed
    assert "the recipe's budget=r4 has no effect, since adapter.rank is set" in printed
    assert "data.splits.test=…" in printed
    events, summary = records(run, "allocation"), read(run / "summary.json")
    left, best = 48, float("inf")
    for event in events:
        auto = event["auto"]
        kept = auto["committed"]
        assert kept is (auto["loss"] <= best * 1.002 if auto["tried"] else None)
        best = min(best, auto["loss"]) if kept is not False else best
        left -= auto["tried"] if kept else 0
        assert auto["best"] == best and event["budget"] == left >= event["alive"]
        if kept is not None:
            word = "kept" if kept else "undone"
            assert f"step {event['step']}/40 cut of {auto['tried']} {word}: held-out loss" in printed
    assert not events[0]["auto"]["learned"]
    first = events[0]["auto"]
    waiting = f"nothing tried before the held-out loss is below {first['below']:.4g}: {first['loss']:.4g}"
    assert f"step 4/40 {waiting}" in printed and first["below"] == pytest.approx(first["initial"] * 0.998)
    assert events[-1]["step"] == 36 and events[-1]["alive"] == left < 48
    assert f"final choice: {left} units alive" in printed
    assert summary["budget"] | {"params_start": 0, "params_end": 0} == {
        "requested": "auto", "components_start": 48, "components_end": left, "params_start": 0, "params_end": 0
    }  # fmt: skip
    assert summary["best"]["step"] in (36, 40)  # from the final choice on
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    assert sum(t.shape[0] for name, t in adapter.items() if "lora_A" in name) == left
    assert (run / "report.html").stat().st_size > 1000


def test_resuming_in_a_trial_gives_the_same_bits(
    dora_train: Train, tmp_path: Path, unplugged: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 15, where a cut of three is on trial, to be put back at 16: fewer than 30 components are too few."""

    def loss(self: Allocation) -> float:
        if isinstance(self.allocator, Trials) and self.allocator.initial is None:
            return 9.0
        return 1.0 if self.table.alive_count() >= 30 else 2.0

    monkeypatch.setattr(Allocation, "_held_out", loss)
    words = [*WORDS, "train.save_every=5", "method=adalora"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(15, *words, f"out={tmp_path}/cut")
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    decided = {e["step"]: (e["auto"]["tried"], e["auto"]["committed"]) for e in records(whole, "allocation")}
    assert decided[12] == (5, True) and decided[16] == (3, False)
    for split in ("allocation", "validation"):
        assert records(whole, split) == records(cut, split)
    first, second = (load_file(run / "adapter/adapter_model.safetensors") for run in (whole, cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_names_plans_and_windows(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without adapter.rank the recipe's budget says the start; the window is not the one that the method has."""
    monkeypatch.chdir(tmp_path)
    words = ["schedule=auto", "train.max_steps=100", "dry_run=json", "out=null", "allocator.interval=40"]
    assert dora_train(*words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["run"]["out"] == "runs/text_classification/dora-bauto-s1" and plan["run"]["budget"] == "auto"
    assert plan["adapter"]["units_start"] == 72 and plan["adapter"]["units_end"] == [54, 72]  # ⌈1.5 · 4⌉ = 6
    assert plan["schedule"]["events"] == [[30, 64], [70, 54], [80, 54]]  # 0.3 to 0.8; ⌈7.2⌉ and ⌈64 · 0.15⌉
    assert plan["schedule"]["found"] == {
        "tolerance": 0.02,
        "cut": 0.1,
        "rows": plan["data"]["splits"]["validation"]["rows"],
    }
    assert any("budget=r4 says alone where the adapter starts" in note for note in plan["notes"])
    assert dora_train(*words[:-1], "schedule.start=80", "schedule.end=80", "data.splits.test=validation.jsonl") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["schedule"]["start"] == 80
    assert "nothing can be tried" in " ".join(w["what"] for w in plan["warnings"])
    assert not any("too good" in note for note in plan["notes"])


@pytest.mark.parametrize(("schedule", "start"), [("auto", 0.4), ("cubic_late", 0.3)])
def test_a_method_that_searches_by_itself_says_when(schedule: str, start: float, tmp_path: Path) -> None:
    """What another method says of its own schedule's window does not hold for a search."""
    from dora_cli.cli.parts import load_parts
    from dora_cli.config.compose import compose

    parts = {"adapter": "lora", "importance": "energy", "schedule": schedule, "allocator": "prune"}
    lines = [f"  - override /{group}: {name}\n" for group, name in (parts | {"regularizer": "none"}).items()]
    (tmp_path / "method").mkdir()
    text = f"# @package _global_\n# A method.\ndefaults:\n{''.join(lines)}schedule:\n  start: 0.4\n"
    (tmp_path / "method" / "mine.yaml").write_text(text)
    words = ["recipe=text_classification", "data.path=x", "method=mine", "schedule=auto"]
    assert compose(words, load_parts(), [tmp_path]).parts["schedule"].start == start


def test_the_rows_are_the_same_each_time_whoever_shares_them(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    from dora_cli.cli.parts import load_parts
    from dora_cli.config.compose import compose
    from dora_cli.evaluation.predict import evaluate
    from dora_cli.training.setup import build

    @dataclass(frozen=True)
    class One(World):
        """Of three processes that never meet: what they would add up is left in ``told``."""

        told: tuple[list[Tensor], ...] = ([],)

        def add_up(self, tensor: Tensor) -> None:
            self.told[0].append(tensor.clone())

    words = [*WORDS, "recipe=text_classification", f"model.name={model_dir}", f"data.path={data_dir}"]
    words += ["data.max_length=16", "schedule.rows=1000", "train.eval_batch_size=7", f"out={tmp_path / 'run'}"]
    session = build(compose(words, load_parts()))
    held_out, rows = session.allocation.held_out, session.encoded["validation"]
    assert held_out is not None
    session.model.train()
    state, value = torch.get_rng_state(), held_out()
    whole = evaluate(session.model, session.task, rows, device="cpu", batch_size=64)
    assert value == held_out() == pytest.approx(whole.metrics["loss"], rel=1e-5)  # there are not as many rows
    assert session.model.training and torch.equal(state, torch.get_rng_state())

    def sums(world: World, rows_asked: int, seed: int = 1) -> Tensor:
        session.composed.parts["schedule"].rows = rows_asked
        args = (session.model, session.task, rows, session.composed.parts, seed, 4, torch.device("cpu"), None, world)
        loss = passes.probes(*args)["held_out"]
        assert loss is not None
        loss()
        return world.told[0].pop()  # type: ignore[attr-defined]

    alone = sums(One(), 9)  # batches of 4, 4 and 1: two processes have nothing in the last
    shared = sum(sums(One(rank=r, size=3), 9) for r in range(3))
    assert alone[1] == 9 and torch.allclose(alone, shared)  # type: ignore[arg-type]
    assert not torch.equal(alone, sums(One(), 9, seed=2))  # drawn, for sets may be sorted


def test_a_loop_of_ones_own_gives_the_loss() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x, y = torch.randn(2, 16, 8)
    options = {"adapter.rank": 4, "adapter.targets": ["0", "2"], "allocator.interval": 2}
    asked: list[float] = []

    def probe() -> float:
        asked.append(1.0 if asked else 9.0)  # learned something, and loses none of it
        return asked[-1]

    with pytest.raises(UserError, match=r"budget=0\.5 and schedule=auto contradict each other"):
        adapt(net, method="adalora", schedule="auto", budget=0.5, options=options, probe=probe)
    dora = adapt(net, method="adalora", schedule="auto", total_steps=40, options=options, probe=probe)
    optimizer = torch.optim.AdamW(dora.parameter_groups(1e-2))
    events = []
    for _ in range(40):
        (net(x) - y).square().mean().backward()
        dora.after_backward()
        optimizer.step()
        events.append(dora.after_step(optimizer))
        optimizer.zero_grad()
    decided = [event["auto"]["loss"] for event in events if event]
    assert decided == asked[1:] and 4 < len(asked) < 12  # of steps 12, 14, … 32: one is left before, so it ends
    assert sum(dora.ranks().values()) == 1


def test_a_window_that_fails_is_not_blamed_on_a_preset_that_does_not_hold(
    dora_train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """dora_plus's file says schedule.end=0.5 of its own shape; the 0.8 is that of `auto`."""
    words = ["method=dora_plus", "out=null", "dry_run=true"]
    assert dora_train(*words, "schedule=auto", "schedule.start=0.9") == 2
    told = capsys.readouterr().err
    assert "schedule.start=0.9 lies after schedule.end=0.8" in told and "dora_plus.yaml" not in told
    assert dora_train(*words, "schedule.start=0.9") == 2
    told = capsys.readouterr().err
    assert "schedule.start=0.9 lies after schedule.end=0.5" in told and "dora_plus.yaml, line" in told
