"""Steps whose loss or gradient is no number are skipped, counted and named, and nothing of them is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_cli.data.tasks.base import Loss
from dora_cli.data.tasks.classification import Classification

Train = Callable[..., int]
AS_IF = [
    ["lora", "budget=r2"],
    ["dora", "budget=r2", "adapter.rank=4", "schedule.start=3"],
    ["adalora", "budget=r2", "adapter.rank=4", "schedule.start=3", "regularizer.weight=0.5"],
    ["sora", "budget=r2", "adapter.rank=4"],
    ["bayesian_lora", "budget=r2", "adapter.rank=4", "regularizer.target_rank=2"],
    ["elalora", "budget=r2", "schedule.start=3"],
    ["dlora", "budget=r2"],
    ["aflora", "budget=r2", "importance.window=2"],
    ["weight_decomposed", "budget=r2"],
]
WORDS = ["train.max_steps=20", "train.save_every=4", "train.eval_every=10", "train.log_every=1"]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def skipped(run: Path) -> list[int]:
    return [r["step"] for r in records(run) if r["split"] == "skipped"]


def finite(file: Path) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in load_file(file).values() if t.is_floating_point())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Make the loss of some training steps NaN, or only their gradient; returns the steps as they come."""

    def at(*steps: int, gradient: bool = False) -> list[int]:
        real, seen = Classification.loss, []

        def loss(self: Any, model: Any, batch: dict[str, Tensor]) -> Loss:
            found = real(self, model, batch)
            if not model.training or not torch.is_grad_enabled():  # an evaluation, a rehearsal
                return found
            seen.append(len(seen) + 1)
            if seen[-1] not in steps:
                return found
            if gradient:
                found.total.register_hook(lambda grad: grad * torch.nan)
                return found
            return found._replace(total=found.total * torch.nan)

        monkeypatch.setattr(Classification, "loss", loss)
        return seen

    return at


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("method", ["dora", "adalora", "increlora", "dlora", "sora", "lora"])
def test_such_steps_are_skipped_and_leave_nothing_behind(
    method: str, gradient: bool, dora_train: Train, broken: Any, tmp_path: Path
) -> None:
    """Some fall on events: every third step from the fourth on, and the last one at the tenth."""
    broken(2, 4, 7, 10, 11, gradient=gradient)
    words = [f"method={method}", "budget=r2", "save.which=last"]
    if method in ("dora", "adalora", "increlora"):
        words += ["schedule.start=4", "schedule.end=10", "allocator.interval=3"]
    words += ["adapter.rank=4"] if method in ("dora", "adalora", "sora") else []
    assert dora_train(*WORDS, *words) == 0
    run = tmp_path / "run"
    assert skipped(run) == [2, 4, 7, 10, 11]
    assert [r["what"] for r in records(run) if r["split"] == "skipped"] == ["gradient" if gradient else "loss"] * 5
    assert [r["step"] for r in records(run) if r["split"] == "train"] == [
        s for s in range(1, 21) if s not in (2, 4, 7, 10, 11)
    ]
    assert all(r["loss"] is not None for r in records(run) if r["split"] != "allocation" and "loss" in r)
    assert finite(run / "adapter/adapter_model.safetensors")
    assert finite(run / "adapter/method_state.safetensors")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train"]["skipped"] == 5
    if method in ("dora", "adalora", "increlora"):
        assert [e["step"] for e in json.loads((run / "ranks.json").read_text())] == [4, 7, 10]
        assert sum(summary["ranks"].values()) == 24


@pytest.mark.parametrize("words", AS_IF, ids=lambda words: words[0])
def test_a_skipped_step_is_as_if_it_had_not_been(
    words: list[str], dora_train: Train, broken: Any, tmp_path: Path
) -> None:
    """Weights, moments, scores and whatever else there is: after it they are those before it. The fifth is no event."""
    common = [*WORDS, "train.scheduler=constant", "train.warmup=0.0", "train.save_every=1", "train.keep_last=50"]
    broken(5)
    assert dora_train(*[f"method={words[0]}", *words[1:]], *common, "train.max_steps=7") == 0

    def state(step: int) -> dict[str, Tensor]:
        folder = tmp_path / f"run/checkpoints/step-{step:08d}"
        tensors = {f"{n} {k}": v for n in ("model", "optimizer", "allocation") for k, v in of(folder / n).items()}
        rest = json.loads((folder / "state.json").read_text())["allocation"]
        return tensors | {f"rest {k}": torch.tensor(v) for k, v in rest.items() if isinstance(v, (int, float))}

    def of(stem: Path) -> dict[str, Tensor]:
        return load_file(stem.with_suffix(".safetensors"))

    before, after, later = (state(step) for step in (4, 5, 6))
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert any(not torch.equal(later[key], after[key]) for key in before)


def test_a_window_of_aflora_holds_steps_that_were_taken(dora_train: Train, broken: Any, tmp_path: Path) -> None:
    """Windows of three: with the sixth step skipped the second one ends with the seventh."""
    words = ["method=aflora", "budget=r2", "importance.window=3", *WORDS, "train.save_every=1", "train.keep_last=50"]
    broken(6)
    assert dora_train(*words, "schedule.end=9") == 0

    def sums(step: int) -> float:
        tensors = load_file(tmp_path / f"run/checkpoints/step-{step:08d}/allocation.safetensors")
        return sum(float(t.sum()) for k, t in tensors.items() if k.startswith("importance|") and k.endswith(".0"))

    assert sums(5) > 0
    assert sums(6) == sums(5)
    assert sums(7) == 0
    assert sums(8) > 0


def test_the_mean_of_what_trained_is_over_steps_that_were_taken(dora_train: Train, broken: Any, tmp_path: Path) -> None:
    broken(3, 4)
    assert dora_train("method=lora", "budget=r2", *WORDS) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["trained_params_mean"] == summary["trained_params"]


def test_resuming_across_skipped_steps_gives_the_same_bits(
    dora_train: Train, unplugged: Callable[..., None], broken: Any, tmp_path: Path
) -> None:
    words = ["method=adalora", "budget=r2", "adapter.rank=4", *WORDS]
    broken(3, 11)
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    seen = broken(3, 11)
    unplugged(8, *words)
    del seen[8:]  # the ninth step comes next
    assert dora_train(*words, "resume=true") == 0
    assert skipped(tmp_path / "run") == skipped(tmp_path / "whole") == [3, 11]
    one, two = (load_file(tmp_path / r / "adapter/adapter_model.safetensors") for r in ("run", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give one training row, the sixth, a loss that is infinite."""
    real, rows = Classification.loss, [5]
    tokens: dict[str, Tensor] = {}
    encode = Classification.encode

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        encoded = encode(self, *args, **options)
        tokens.setdefault("ids", encoded[5]["input_ids"].long())  # train is encoded first
        return encoded

    def loss(self: Any, model: Any, batch: dict[str, Tensor]) -> Loss:
        found = real(self, model, batch)
        ids = tokens["ids"]
        width = min(len(ids), batch["input_ids"].shape[1])
        same = (batch["input_ids"][:, :width] == ids[:width]).all(1) & (batch["attention_mask"].sum(1) == len(ids))
        return found._replace(total=found.total + torch.where(same.any(), torch.inf, 0.0))

    monkeypatch.setattr(Classification, "encode", noted)
    monkeypatch.setattr(Classification, "loss", loss)
    return rows


def test_the_row_to_blame_is_named(
    dora_train: Train, poisoned: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_train("method=lora", "budget=r1", "train.epochs=2", "train.eval_every=1000") in (0, 2)
    found = [r for r in records(tmp_path / "run") if r["split"] == "skipped"]
    assert found
    assert all(5 in r["guilty"] and set(r["guilty"]) < set(r["rows"]) for r in found)
    out = capsys.readouterr().out
    assert f"step {found[0]['step']} skipped: its loss is not finite, rows 5 of train" in out


def test_rows_are_those_of_all_micro_batches(dora_train: Train, poisoned: list[int], tmp_path: Path) -> None:
    words = ["method=lora", "budget=r1", "train.epochs=1", "train.batch_size=4", "train.accumulation=2"]
    assert dora_train(*words, "train.eval_every=1000") in (0, 2)
    found = [r for r in records(tmp_path / "run") if r["split"] == "skipped"]
    assert found
    assert all(len(set(r["rows"])) == 8 and 5 in r["guilty"] for r in found)


def test_a_row_that_is_a_batch_is_to_blame_and_not_the_run(
    dora_train: Train, poisoned: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=lora", "budget=r1", "train.max_skipped=0", "train.batch_size=1", "train.save_every=10"]
    words.append("train.epochs=2")
    assert dora_train(*words, "train.eval_every=1000") == 2
    said = capsys.readouterr().err
    assert "diverged" not in said
    assert "line 6" in said
    assert "resume=true train.max_skipped=10" in said
    assert dora_train(*words, "train.eval_every=1000", "train.max_steps=96", "resume=true", "train.max_skipped=10") == 2
    assert "train.max_steps" in capsys.readouterr().err  # only that may differ
    assert dora_train(*words, "train.eval_every=1000", "resume=true", "train.max_skipped=10") in (0, 2)
    assert len([r for r in records(tmp_path / "run") if r["split"] == "skipped"]) > 1


def test_too_many_end_the_run(
    dora_train: Train, poisoned: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=lora", "budget=r1", "train.max_skipped=0", "train.eval_every=1000", "train.save_every=1"]
    assert dora_train(*words) == 2
    said = capsys.readouterr().err
    assert "the loss is not finite at step" in said
    assert "rows of train that have no finite loss by themselves: 5 (from 0)\n  the first: " in said
    assert "line 6" in said
    assert "train.max_skipped" in said
    assert not (tmp_path / "run/adapter").exists()


def test_weights_that_are_no_numbers_are_not_saved(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=full", "train.learning_rate=1e38", "train.save_every=1", "train.max_skipped=3", "train.warmup=0.0"]
    assert dora_train(*words, "train.eval_every=1000") == 2
    shown = capsys.readouterr()
    assert "the run has diverged" in shown.err
    assert "lower train.learning_rate" in shown.err
    for file in (tmp_path / "run").glob("checkpoints/*/model.safetensors"):
        assert finite(file)
