"""B-LoRA through the real command: the exact budget, one reading of the adapter by all, and resume to the same bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.adapters.quantise import THRESHOLD, decided, first_open, nested
from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge

Train = Callable[..., int]
# Short runs: rates at which gates shut within thirty steps, so that there is something to decide.
QUICK = ["method=bayesian_lora", "adapter.gate_learning_rate=0.5", "regularizer.weight=0.05", "train.log_every=4"]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_on_budget_with_a_component_everywhere(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train(*QUICK, "budget=r1.5", "adapter.rank=4") == 0
    run = tmp_path / "run"
    summary, events = summary_of(run), json.loads((run / "ranks.json").read_text())
    assert summary["budget"]["components_start"] == 12 * 4
    assert summary["budget"]["components_end"] == 18 == sum(summary["ranks"].values())
    assert min(summary["ranks"].values()) >= 1
    assert len(events) == 1 and events[0]["step"] == summary["train"]["steps"] // 2
    assert summary["best"]["step"] >= events[0]["step"]
    weights = load_file(run / "adapter/adapter_model.safetensors")
    a = {k: v for k, v in weights.items() if "lora_A" in k}
    b = {k: v for k, v in weights.items() if "lora_B" in k}
    assert sum(v.shape[0] for v in a.values()) == 18
    # gates that were shut are open for good where their component is kept
    state = load_file(run / "adapter/method_state.safetensors")
    shut = {k: state[f"{k[17:-14]}.rank_logits"] < THRESHOLD for k in b}
    assert any(bool((v.abs().sum(0) > 0)[shut[k]].any()) for k, v in b.items())


def test_a_budget_of_parameters_is_met_by_cost(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train(*QUICK, "budget=800", "adapter.rank=4", "train.max_steps=10") == 0
    summary = summary_of(tmp_path / "run")
    assert 800 - 48 < summary["budget"]["params_end"] <= 800
    assert min(summary["ranks"].values()) >= 1


def test_what_lies_beside_the_adapter_says_bits_ranges_and_logits(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train(*QUICK, "budget=r1.5", "adapter.rank=4", "adapter.n_bits=8", "train.max_steps=20") == 0
    folder = tmp_path / "run/adapter"
    state, weights = load_file(folder / "method_state.safetensors"), load_file(folder / "adapter_model.safetensors")
    modules = list(summary_of(tmp_path / "run")["ranks"])
    assert len(modules) == 12
    for module in modules:
        assert state[f"{module}.bits"].tolist() and set(state[f"{module}.bits"].tolist()) <= {2, 4, 8}
        assert state[f"{module}.bit_logits"].shape == (3, 2)
        rank = len(state[f"{module}.rank_logits"])
        a = weights[f"base_model.model.{module}.lora_A.weight"]
        assert a.shape[0] == rank
        # the exported factor lies on the grid that the side file names
        step = 2 * float(state[f"{module}.ranges"][0]) / (2 ** int(state[f"{module}.bits"][0]) - 1)
        level = a.double() / step
        assert float((level - level.round()).abs().max()) < 1e-2
    assert state["score"].shape == (48,)
    assert float(state["score"][state["alive"].bool()].min()) > 0


def test_the_adapter_reads_the_same_everywhere(dora_train: Train, tmp_path: Path, data_dir: Path) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    from dora_cli.checkpoints.adapter_file import read_adapter
    from dora_cli.checkpoints.apply import apply_adapter

    assert dora_train(*QUICK, "budget=r1.5", "adapter.rank=4", "save.which=last", "train.max_steps=30") == 0
    run = tmp_path / "run"
    expected = summary_of(run)["metrics"]["validation"]
    assert dora_merge([f"checkpoint={run}", f"out={tmp_path}/merged"]) == 0
    for i, place in enumerate((run, run / "adapter", tmp_path / "merged")):
        out = tmp_path / f"eval{i}"
        words = [f"checkpoint={place}", f"out={out}", "recipe=text_classification", f"data.path={data_dir}"]
        assert dora_eval([*words, "data.max_length=16"]) == 0
        found = json.loads((out / "eval-validation.json").read_text())
        metrics = found.get("metrics", found)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, abs=1e-5), (place, name)

    base = json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    ids = torch.randint(4, 20, (5, 9))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits  # type: ignore[no-any-return]

    ours, theirs = (AutoModelForSequenceClassification.from_pretrained(base, num_labels=2) for _ in range(2))
    untrained = logits(ours)
    apply_adapter(ours, read_adapter(run))
    assert torch.allclose(logits(ours), logits(peft.PeftModel.from_pretrained(theirs, run / "adapter")), atol=1e-5)
    assert not torch.allclose(logits(ours), untrained, atol=1e-3)


@pytest.mark.parametrize("budget", ["budget=r0.9", "budget=0.2", "budget=300"])
def test_a_budget_below_one_component_a_module_is_refused_and_nothing_is_written(
    budget: str, dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_train("method=bayesian_lora", budget, "adapter.rank=4") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and budget in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_options_that_cannot_be_meant_are_refused(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, named in (
        ("adapter.n_bits=6", "adapter.n_bits=6"),
        ("regularizer.dual_rate=0.1", "regularizer.dual_rate=0.1"),
        ("adapter=components", "gate_probability"),
    ):
        assert dora_train("method=bayesian_lora", "budget=r2", word, "model.name=/nowhere") == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


DUAL = ["regularizer.target_rank=1.5", "train.gradient_checkpointing=true", "train.accumulation=2"]


@pytest.mark.parametrize(
    ("step", "more"),
    [(7, []), pytest.param(14, DUAL, marks=pytest.mark.slow), pytest.param(21, [], marks=pytest.mark.slow)],
)  # before the choice, at step 12, and after
def test_resuming_gives_the_same_bits(
    step: int, more: list[str], dora_train: Train, tmp_path: Path, unplugged: Callable[..., None]
) -> None:
    words = [*QUICK, "budget=r1.5", "adapter.rank=4", "train.max_steps=24", "train.save_every=7", *more]

    def outcome(run: Path) -> tuple[Any, ...]:
        metrics = [{k: v for k, v in r.items() if k != "samples_per_second"} for r in records_of(run)]
        files = (
            load_file(run / "adapter" / name) for name in ("adapter_model.safetensors", "method_state.safetensors")
        )
        return metrics, json.loads((run / "ranks.json").read_text()), *files

    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(step, *words, f"out={tmp_path}/cut")
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    whole, cut = outcome(tmp_path / "whole"), outcome(tmp_path / "cut")
    assert whole[:2] == cut[:2]
    for tensors, again in zip(whole[2:], cut[2:], strict=True):
        assert tensors.keys() == again.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, again[name]), name


def test_the_published_form_trains_without_a_choice(dora_train: Train, tmp_path: Path) -> None:
    """No allocator: gates alone say the rank, and what they shut is zero in the file."""
    words = ["allocator=none", "importance=none", "schedule=constant", "budget=r4", "regularizer.weight=1.0"]
    assert dora_train(*QUICK[:2], *words, "adapter.gate_learning_rate=1.0", "train.max_steps=30") == 0
    folder = tmp_path / "run/adapter"
    weights, state = load_file(folder / "adapter_model.safetensors"), load_file(folder / "method_state.safetensors")
    columns = {k[17:-14]: v for k, v in weights.items() if "lora_B" in k}
    ranks = {k: int(nested(first_open(decided(state[f"{k}.rank_logits"]))).sum()) for k in columns}
    assert len(ranks) == 12 and sum(ranks.values()) < 48
    assert not any(bool(columns[k][:, rank:].any()) for k, rank in ranks.items())
