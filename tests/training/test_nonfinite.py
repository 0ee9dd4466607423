"""Steps whose loss or gradient is no number are skipped, counted and named, and nothing of them is kept."""

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dora_cli.allocation import verdict
from dora_cli.cli import train_run
from dora_cli.data.tasks.base import Loss
from dora_cli.data.tasks.classification import Classification

Train = Callable[..., int]
AS_IF = [
    ["lora", "budget=r2"],
    ["dora", "budget=r2", "adapter.rank=4", "schedule.start=3"],
    ["adalora", "budget=r2", "adapter.rank=4", "schedule.start=3", "regularizer.weight=0.5"],
    ["dora", "budget=r2", "adapter.rank=4", "schedule.start=3", "regularizer.mode=decoupled"],
    ["increlora", "budget=r2", "schedule.start=3", "schedule.end=6", "allocator.interval=100"],
    ["sora", "budget=r2", "adapter.rank=4"],
    ["bayesian_lora", "budget=r2", "adapter.rank=4", "regularizer.target_rank=2"],
    ["elalora", "budget=r2", "schedule.start=3"],
    ["dlora", "budget=r2"],
    ["aflora", "budget=r2", "importance.window=2"],
    ["weight_decomposed", "budget=r2"],
]
FEW = ("adalora", "bayesian_lora", "increlora")  # of each kind of state one
QUIET = ("lora", "elalora", "increlora", "weight_decomposed")  # what acts in between is that of the others
WORDS = ["train.max_steps=20", "train.save_every=4", "train.eval_every=10", "train.log_every=1"]


@pytest.fixture(params=["host", "device"])
def decided(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who decides whether a step is taken; on a GPU the device does, here told to."""
    if request.param == "device":
        monkeypatch.setattr(verdict, "waits", lambda device: True)


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


@pytest.mark.covering(1)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("method", ["dora", "adalora", "increlora", "dlora", "sora", "lora"])
def test_such_steps_are_skipped_and_leave_nothing_behind(
    method: str, gradient: bool, decided: None, dora_train: Train, broken: Any, tmp_path: Path
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


@pytest.mark.covering(1)
@pytest.mark.parametrize("words", AS_IF, ids=lambda words: words[0])
def test_a_skipped_step_is_as_if_it_had_not_been(
    words: list[str], decided: None, dora_train: Train, broken: Any, tmp_path: Path
) -> None:
    """Weights, moments, scores and whatever else there is: after it they are those before it. The fifth is no event."""
    common = [*WORDS, "train.scheduler=constant", "train.warmup=0.0", "train.save_every=1", "train.keep_last=50"]
    broken(5)
    assert dora_train(*[f"method={words[0]}", *words[1:]], *common, "train.max_steps=7") == 0

    def state(step: int) -> dict[str, Tensor]:
        folder = tmp_path / f"run/checkpoints/step-{step:08d}"
        tensors = {f"{n} {k}": v for n in ("model", "optimizer", "allocation") for k, v in of(folder / n).items()}
        rest = json.loads((folder / "state.json").read_text())["allocation"]
        numbers = {k: v for k, v in rest.items() if isinstance(v, (int, float)) and not k.endswith("|seen")}
        return tensors | {f"rest {k}": torch.tensor(v) for k, v in numbers.items()}

    def of(stem: Path) -> dict[str, Tensor]:
        return load_file(stem.with_suffix(".safetensors"))

    before, after, later = (state(step) for step in (4, 5, 6))
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert any(not torch.equal(later[key], after[key]) for key in before)


def test_a_window_of_aflora_is_averaged_over_steps_that_were_taken(
    decided: None, dora_train: Train, broken: Any, tmp_path: Path
) -> None:
    """Windows of two: of the third one step is left, of the fourth none, which then says nothing."""
    words = ["method=aflora", "budget=r2", "importance.window=2", *WORDS, "train.save_every=1", "train.keep_last=50"]
    broken(6, 7, 8)
    assert dora_train(*words, "schedule.end=20") == 0

    def of(step: int, i: int) -> dict[str, Tensor]:
        tensors = load_file(tmp_path / f"run/checkpoints/step-{step:08d}/allocation.safetensors")
        return {k: t for k, t in tensors.items() if k.startswith("importance|") and k.endswith(f".{i}")}

    total, mean = of(5, 0), of(4, 1)
    assert sum(float(t.sum()) for t in total.values()) > 0
    for key, after in of(6, 1).items():
        before = mean[key]
        assert torch.allclose(after, 0.85 * before + 0.15 * total[key.removesuffix("1") + "0"], rtol=1e-6, atol=0)
    assert all(torch.equal(of(8, i)[key], value) for i in (1, 2) for key, value in of(6, i).items())
    assert all(float(t.sum()) == 0 for t in of(8, 0).values())


@pytest.mark.parametrize("words", [w for w in AS_IF if w[0] in FEW], ids=lambda words: words[0])
def test_host_and_device_decide_alike(
    words: list[str], dora_train: Train, broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [f"method={words[0]}", *words[1:], *WORDS, "train.log_every=6"]
    for name in ("host", "device"):
        monkeypatch.setattr(verdict, "waits", lambda device, name=name: name == "device")
        broken(3, 5, 6)
        assert dora_train(*common, f"out={tmp_path}/{name}") == 0
    for file in ("adapter/adapter_model.safetensors", "ranks.json"):
        assert (tmp_path / "host" / file).read_bytes() == (tmp_path / "device" / file).read_bytes(), file
    one, two = (
        [{k: v for k, v in r.items() if k != "samples_per_second"} for r in records(tmp_path / name)]
        for name in ("host", "device")
    )
    assert sorted(map(str, one)) == sorted(map(str, two))  # skipped steps are written down later, but all are
    assert [r["step"] for r in one if r["split"] == "skipped"] == [3, 5, 6]
    assert all(r["gradient_norm"] is not None for r in one if r["split"] == "train"), "of the last step that was taken"


def test_a_signal_counts_what_the_device_has_skipped_before_it_saves(
    dora_train: Train, broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "waits", lambda device: True)
    seen = broken(2)

    class Interrupted(train_run.Signals):
        """The signal comes in the fifth step."""

        @property
        def name(self) -> str | None:  # type: ignore[override]
            return "SIGTERM" if len(seen) >= 5 else None

        @name.setter
        def name(self, value: str | None) -> None:
            pass

    monkeypatch.setattr(train_run, "Signals", Interrupted)
    words = ["method=lora", "budget=r2", "train.max_steps=20", "train.log_every=100", "train.eval_every=100"]
    assert dora_train(*words, "train.save_every=100") == 143
    (folder,) = (tmp_path / "run/checkpoints").iterdir()
    progress = json.loads((folder / "state.json").read_text())["progress"]
    assert (progress["step"], progress["skipped"], progress["pending_steps"]) == (5, 1, 4)


class Transfers(TorchDispatchMode):
    """Notes in which training steps a number is asked of a tensor that would lie on the device, and by whom.

    Batches lie on the host until they are sent: what ``data``, ``count`` and ``_size`` do is free.
    """

    def __init__(self, steps: list[int]) -> None:
        super().__init__()
        self.steps, self.asked = steps, set[tuple[int, str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [f for f in traceback.extract_stack() if "/dora_cli/" in f.filename]
            if not any("/data/" in f.filename for f in frames) and frames and frames[-1].name not in ("count", "_size"):
                self.asked.add((len(self.steps), f"{frames[-1].filename.split('dora_cli/')[-1]}:{frames[-1].name}"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("words", [w for w in AS_IF if w[0] not in QUIET], ids=lambda words: words[0])
def test_between_events_and_logs_the_host_asks_for_nothing(
    words: list[str], dora_train: Train, broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps after which nothing is logged, evaluated or saved, and which are no events, one of them skipped."""
    monkeypatch.setattr(verdict, "waits", lambda device: True)
    common = ["train.max_steps=24", "train.log_every=8", "train.eval_every=24", "train.save_every=24"]
    if words[0] not in ("lora", "weight_decomposed"):
        common += ["allocator.interval=8", "schedule.end=16"]
        common += [] if words[0] in ("sora", "bayesian_lora") else ["schedule.start=8"]
    steps = broken(13)
    plain = [w for w in words[1:] if not w.startswith("schedule.start")]
    with Transfers(steps) as transfers:
        assert dora_train(f"method={words[0]}", *plain, *common, "train.workers=0") == 0
    asked = {step for step, _ in transfers.asked if step > 0}
    assert {8, 16, 24} <= asked  # the check sees something
    assert asked <= {1, 8, 16, 24}, sorted(transfers.asked)  # tables of the units are laid out in the first


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
