"""DLoRA through the real command: plain LoRA at the limit, exact resume, and the export of modules that are off."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.allocation.importance.displacement import Displacement

Train = Callable[..., int]
# 40 steps: events at every second step, revivals at 6 and on, the final choice at 20
WORDS = ["method=dlora", "budget=r2", "train.max_steps=40", "allocator.interval=2", "allocator.active=0.3"]
WORDS += ["allocator.probation=2", "train.log_every=4", "train.eval_every=10"]


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_with_all_modules_active_the_command_gives_loras_bits(dora_train: Train, tmp_path: Path) -> None:
    common = ["budget=r2", "train.max_steps=30", "train.warmup=0.06", "adapter.dropout=0.1"]
    assert dora_train(*common, "method=lora", f"out={tmp_path}/lora") == 0
    assert dora_train(*common, "method=dlora", "allocator.active=1.0", f"out={tmp_path}/dlora") == 0
    one, two = adapter_of(tmp_path / "lora"), adapter_of(tmp_path / "dlora")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("adapter", ["lora", "components", "aflora"])
def test_the_number_in_training_is_the_schedules_and_the_run_learns(
    adapter: str, dora_train: Train, tmp_path: Path
) -> None:
    assert dora_train(*WORDS, f"adapter={adapter}", "train.max_steps=60", "train.log_every=10") == 0
    events = read(tmp_path / "run/ranks.json")
    assert [event["step"] for event in events] == [1, *range(3, 30, 2), 30]
    for event in events:
        x = min(max((event["step"] - 3) / 27, 0.0), 1.0)
        assert event["alive"] == 4 + round(8 * (1 - x) ** 3) == 12 - len(event["idle"])
    assert any(event["probation"] for event in events)
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in metrics if record["split"] == "train"]
    assert losses[-1] < losses[0]
    summary = read(tmp_path / "run/summary.json")
    assert summary["unit"] == "modules"
    assert summary["trained_params_mean"] < summary["trained_params"]


@pytest.mark.parametrize(
    ("options", "step"),
    [
        pytest.param(["allocator.killed=drop"], 9, marks=pytest.mark.slow),
        (["allocator.killed=freeze", "allocator.state=keep"], 9),
        # the checkpoint lies between the step that lets gradients into idle modules and the one that reads them
        (["allocator.choice=probe"], 9),
        pytest.param(["importance=random"], 9, marks=pytest.mark.slow),
        (["adapter=components", "importance.measure=parameters"], 12),
    ],
)
def test_resuming_in_the_middle_gives_the_same_bits(
    options: list[str], step: int, dora_train: Train, tmp_path: Path, unplugged: Callable[..., None]
) -> None:
    words = [*WORDS, *options, "train.save_every=3", "train.max_steps=30"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(step, *words, f"out={tmp_path}/cut")
    assert not (tmp_path / "cut/summary.json").exists()
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    assert read(tmp_path / "whole/ranks.json") == read(tmp_path / "cut/ranks.json")
    one, two = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resume_that_had_lost_its_snapshots_would_be_noticed(
    dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unplugged: Callable[..., None]
) -> None:
    words = [*WORDS, "train.save_every=3"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(9, *words, f"out={tmp_path}/cut")
    monkeypatch.setattr(Displacement, "load_state_dict", lambda self, state: None)
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    assert read(tmp_path / "whole/ranks.json") != read(tmp_path / "cut/ranks.json")


@pytest.mark.parametrize("killed", ["drop", "freeze"])
def test_export_holds_the_modules_that_are_on_and_peft_merge_and_eval_agree(
    killed: str, dora_train: Train, tmp_path: Path, model_dir: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    from dora_cli.checkpoints.adapter_file import read_adapter
    from dora_cli.checkpoints.apply import apply_adapter
    from dora_cli.cli.eval import main as dora_eval

    peft = pytest.importorskip("peft")
    assert dora_train(*WORDS, f"allocator.killed={killed}", "save.merged=true", "train.eval_every=5") == 0
    run = tmp_path / "run"
    summary, event = read(run / "summary.json"), read(run / "ranks.json")[-1]
    on = [name for name in summary["ranks"] if killed == "freeze" or name not in event["idle"]]
    assert len(on) == (4 if killed == "drop" else 12)
    assert summary["ranks"] == {name: 2 if name in on else 0 for name in summary["ranks"]}
    assert summary["budget"]["components_end"] == len(on)
    assert sorted(read(run / "adapter/adapter_config.json")["target_modules"]) == sorted(on)
    assert read(run / "adapter/method.json")["ranks"] == summary["ranks"]
    if killed == "drop":
        assert summary["best"]["step"] >= 20, "before the end more modules are on than at the end"
        assert event["per_token"]["values"] == sum(2 * d for d in event_shapes(model_dir, on))

    torch.manual_seed(2)
    inputs = {"input_ids": torch.randint(4, 20, (6, 11))}
    fresh = {"num_labels": 2, "dtype": torch.float32}

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**inputs).logits  # type: ignore[no-any-return]

    ours = AutoModelForSequenceClassification.from_pretrained(model_dir, **fresh)
    apply_adapter(ours, read_adapter(run))
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, **fresh)
    theirs = peft.PeftModel.from_pretrained(base, run / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(run / "merged", dtype=torch.float32)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert torch.allclose(logits(ours), logits(merged), atol=1e-5)
    assert dora_eval([f"checkpoint={run}", f"out={tmp_path}/eval"]) == 0
    record = read(tmp_path / "eval/eval-validation.json")
    assert record["metrics"]["loss"] == pytest.approx(summary["metrics"]["validation"]["loss"], abs=1e-5)


def event_shapes(model_dir: Path, names: list[str]) -> list[int]:
    """d_in + d_out of the named modules, from the base's own file."""
    weights = load_file(model_dir / "model.safetensors")
    return [sum(weights[f"{name.removeprefix('bert.')}.weight"].shape) for name in names]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["allocator.choice=probe", "allocator.killed=drop"], "allocator.choice=probe"),
        (["importance=component_norm"], "component_norm"),
        (["schedule=constant"], "never moves"),
        (["allocator.active=0"], "allocator.active"),
        (["importance=none"], "importance"),
        (["adapter=full"], "adapter=full"),
        (["regularizer=dem"], "dem"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_loads(
    overrides: list[str], message: str, dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_train("method=dlora", "budget=r2", "model.name=./nowhere", *overrides) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert message in text
    assert "nowhere" not in text
    assert not (tmp_path / "run").exists()
