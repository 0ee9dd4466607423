"""MoRA and its components through the real commands: trained, on budget, saved, merged, evaluated, resumed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.cli.eval import main as dora_eval

Train = Callable[..., int]
# per layer of the tiny BERT: query, key, value, output (16×16), intermediate (32×16), output (16×32)
SUMS = ([32] * 4 + [48] * 2) * 2


def read(path: Path) -> Any:
    return json.loads(path.read_text())


METHODS = {
    "rotation": ["method=mora", "budget=r2"],
    "sharing": ["method=mora", "adapter.kind=sharing", "budget=r2"],
    "components": ["method=mora_components", "budget=r4", "adapter.rank=6", "adapter.square_rank=4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_run_adapter_and_merged_evaluate_alike(name: str, dora_train: Train, tmp_path: Path) -> None:
    assert dora_train(*METHODS[name], "train.epochs=16", "train.learning_rate=0.02", "save.merged=true") == 0
    run = tmp_path / "run"
    expected = read(run / "summary.json")["metrics"]["validation"]
    assert expected["loss"] < math.log(2) - 0.02, "no better than a guess"
    config = f"recipe={run}/config.yaml"
    for checkpoint, extra in ((run, []), (run / "adapter", []), (run / "merged", [config])):
        out = tmp_path / f"eval-{checkpoint.name}"
        assert dora_eval([f"checkpoint={checkpoint}", f"out={out}", *extra]) == 0
        metrics = read(out / "eval-validation.json")["metrics"]
        assert metrics["accuracy"] == expected["accuracy"]
        assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.parametrize(("kind", "even"), [("rotation", True), ("sharing", False)])
def test_squares_have_the_size_of_their_share_of_the_budget(
    kind: str, even: bool, dora_train: Train, tmp_path: Path
) -> None:
    assert dora_train("method=mora", f"adapter.kind={kind}", "budget=r2.5", "train.max_steps=4") == 0
    run = tmp_path / "run"
    summary = read(run / "summary.json")
    sides = [math.isqrt(s * r) for s, r in zip(SUMS, [3] * 6 + [2] * 6, strict=True)]
    sides = [side - side % 2 if even else side for side in sides]
    assert list(summary["ranks"].values()) == sides
    assert summary["unit"] == "modules"
    assert summary["budget"]["params_start"] == summary["budget"]["params_end"] == sum(s * s for s in sides)
    config = read(run / "adapter/adapter_config.json")
    assert config["peft_type"] == ("MORA" if even else "LORA")
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    if even:
        assert sum(t.numel() for n, t in tensors.items() if n.endswith("mora_M")) == sum(s * s for s in sides)
    assert read(run / "adapter/method.json")["parts"]["adapter"] == "mora"


def test_a_budget_in_parameters_is_never_exceeded_by_squares(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("method=mora", "budget=900", "train.max_steps=2", "save.merged=true") == 0
    summary = read(tmp_path / "run/summary.json")
    assert 450 < summary["budget"]["params_end"] <= 900
    assert summary["trained_params"] - summary["head_params"] == summary["budget"]["params_end"]


def test_modules_that_the_budget_leaves_out_are_not_in_the_file(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("method=mora", "budget=r0.5", "train.max_steps=2", "save.merged=true") == 0
    run = tmp_path / "run"
    ranks = read(run / "summary.json")["ranks"]
    assert sum(rank > 0 for rank in ranks.values()) == 6
    assert set(read(run / "adapter/adapter_config.json")["modules"]) == {name for name, rank in ranks.items() if rank}


def test_sharing_loads_in_peft_with_equal_logits(dora_train: Train, model_dir: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    for name in ("sharing", "components"):
        run = tmp_path / name
        assert dora_train(*METHODS[name], "train.epochs=2", "save.merged=true", f"out={run}") == 0
        base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2)
        theirs = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
        merged = AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()
        ids = torch.randint(4, 24, (5, 9))
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, merged(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", ["r2", "600"])
def test_components_end_on_budget_counted_in_the_squares_parameters(
    budget: str, dora_train: Train, tmp_path: Path
) -> None:
    words = ["method=mora_components", f"budget={budget}", "adapter.rank=4", "adapter.square_rank=2"]
    assert dora_train(*words, "allocator.interval=3", "train.epochs=4") == 0
    run = tmp_path / "run"
    summary = read(run / "summary.json")
    costs = [2 * math.isqrt(2 * s) for s in SUMS]  # 16 and 18
    assert summary["budget"]["components_start"] == 48
    assert summary["budget"]["params_start"] == 4 * sum(costs)
    end = sum(rank * cost for rank, cost in zip(summary["ranks"].values(), costs, strict=True))
    assert summary["budget"]["params_end"] == end
    assert summary["budget"]["components_end"] == sum(summary["ranks"].values())
    if budget == "r2":
        assert summary["budget"]["components_end"] == 24
    else:
        assert 600 - max(costs) < end <= 600
    gates = summary["budget"]["components_end"]
    assert summary["trained_params"] - summary["head_params"] == end + gates
    assert len(set(summary["ranks"].values())) > 1, "nothing was ranked"


def test_the_start_rank_follows_from_a_budget_in_the_squares_parameters(dora_train: Train, tmp_path: Path) -> None:
    words = ["method=mora_components", "budget=600", "adapter.square_rank=2", "train.max_steps=20"]
    assert dora_train(*words) == 0
    start = math.ceil(1.5 * 600 / sum(2 * math.isqrt(2 * s) for s in SUMS))
    assert read(tmp_path / "run/summary.json")["budget"]["components_start"] == 12 * start


@pytest.mark.parametrize(("name", "step"), [("rotation", 14), ("components", 7)])
def test_resuming_gives_the_same_bits(
    name: str, step: int, dora_train: Train, tmp_path: Path, unplugged: Callable[..., None]
) -> None:
    words = [*METHODS[name], "train.max_steps=24", "train.save_every=7", "adapter.dropout=0.1"]
    words += ["allocator.interval=3"] if name == "components" else []
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(step, *words, f"out={tmp_path}/cut")
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    one, two = (load_file(tmp_path / x / "adapter/adapter_model.safetensors") for x in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert read(tmp_path / "whole/ranks.json") == read(tmp_path / "cut/ranks.json")


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_in_bf16_with_checkpointing(name: str, dora_train: Train, tmp_path: Path) -> None:
    words = ["train.precision=bf16", "train.gradient_checkpointing=true", "train.max_steps=6", "train.log_every=1"]
    assert dora_train(*METHODS[name], *words) == 0
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(r["loss"]) for r in records if r["split"] == "train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=mora", "allocator=prune"], "adapter=mora_components can be pruned"),
        (["method=mora", "export=uniform"], "save.merged=true"),
        (["method=mora", "adapter.kind=rotatoin"], "rotation"),
        (["method=mora", "adapter.init=eva"], "adapter.init"),
        (["method=mora", "adapter.alpha=8"], "adapter.alpha"),
        (["method=mora", "adapter.init_from=/nowhere"], "adapter.init_from"),
        (["method=mora_components", "adapter.rank=4", "adapter.init=eva"], "eva"),
        (["method=mora_components", "adapter.rank=4", "adapter.init_rho=2"], "init_rho"),
        (["method=mora_components", "adapter.rank=4", "adapter.init_from=/nowhere"], "adapter.init_from"),
        (["method=mora_components", "adapter.rank=4", "adapter.square_rank=0"], "square_rank"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_loads(
    overrides: list[str], message: str, dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_train(*overrides, "budget=r2", "model.name=/nowhere") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert message in text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 6
    assert not (tmp_path / "run").exists()
