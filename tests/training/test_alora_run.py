"""ALoRA through the real command: its probe, its record, export, and exact resume between two rounds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.allocation.importance.gradient import Gradient
from dora_cli.allocation.table import UnitTable
from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge

Train = Callable[..., int]
# 30 steps; eight rounds from step 4 to 18
WORDS = ["method=alora", "budget=r2", "train.max_steps=30", "schedule.start=4", "allocator.interval=2"]
WORDS += ["importance.rows=8", "train.log_every=4", "train.eval_every=10", "train.save_every=3"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def test_ranks_move_and_the_result_reloads_merges_and_keeps_its_record(dora_train: Train, tmp_path: Path) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert dora_train(*WORDS) == 0
    events, summary = read(run / "ranks.json"), read(run / "summary.json")
    assert [event["step"] for event in events] == list(range(4, 19, 2))
    total = 24
    for event in events:
        assert event["alive"] in (total, total - 3)  # an eighth closes; where every module lost one, none is added
        total = event["alive"]
        assert len(event["scores"]) <= 12 and all(isinstance(score, float) for score in event["scores"].values())
    assert len(set(events[-1]["ranks"].values())) > 1
    assert summary["best"]["step"] >= 20
    assert sum(t.shape[0] for name, t in adapter_of(run).items() if "lora_A" in name) == total
    assert dora_merge([f"checkpoint={run}", f"out={merged}"]) == 0
    for checkpoint, extra in ((run, []), (merged, [f"recipe={run}/config.yaml"])):
        out = tmp_path / f"eval-{checkpoint.name}"
        assert dora_eval([f"checkpoint={checkpoint}", f"out={out}", *extra]) == 0
        loss = read(out / "eval-validation.json")["metrics"]["loss"]
        assert loss == pytest.approx(summary["metrics"]["validation"]["loss"], abs=1e-5)


def test_the_probe_sees_one_batch_of_validation_rows_in_eval_mode_and_the_runs_precision(
    model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    from dora_cli.cli.parts import load_parts
    from dora_cli.config.compose import compose
    from dora_cli.training.setup import build

    words = [*WORDS, "recipe=text_classification", f"model.name={model_dir}", f"data.path={data_dir}"]
    words += ["data.max_length=16", "train.precision=bf16", "adapter.dropout=0.5", f"out={tmp_path / 'run'}"]
    session = build(compose(words, load_parts()))
    session.model.train()
    seen: list[tuple[bool, torch.dtype, torch.Tensor]] = []
    session.model.register_forward_hook(
        lambda model, args, kwargs, out: seen.append((model.training, out.logits.dtype, kwargs["input_ids"].clone())),
        with_kwargs=True,
    )
    with torch.no_grad():
        for layer in session.layers.values():
            layer.b.normal_()  # type: ignore[operator, union-attr]
    rng = torch.get_rng_state()
    scores = [session.allocation._scores() for _ in range(2)]
    assert torch.equal(*scores)  # nothing about it is drawn
    assert torch.equal(rng, torch.get_rng_state())
    assert session.model.training
    assert len(seen) == 2 * (1 + 2 * 24)  # the whole model, and two forwards per rank
    rows = session.encoded["validation"]
    first = rows.batch(range(8))["input_ids"]
    for training, dtype, batch in seen:
        assert not training and dtype is torch.bfloat16 and torch.equal(batch, first)


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["importance=gradient"], marks=pytest.mark.slow),
        pytest.param(
            ["adapter=components", "importance.only_term=false", "budget=700", "allocator.n=2"], marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_resuming_between_two_rounds_gives_the_same_bits(
    options: list[str], dora_train: Train, tmp_path: Path, unplugged: Callable[..., None]
) -> None:
    words = [word for word in WORDS if options != ["importance=gradient"] or "importance.rows" not in word] + options
    words.append("adapter.targets=[query,value]")  # ablation runs the model twice for each component
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(9, *words, f"out={tmp_path}/cut")
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    assert read(tmp_path / "whole/ranks.json") == read(tmp_path / "cut/ranks.json")
    one, two = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resume_that_had_lost_its_state_would_be_noticed(
    dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unplugged: Callable[..., None]
) -> None:
    words = [word for word in WORDS if "importance.rows" not in word] + ["importance=gradient"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(9, *words, f"out={tmp_path}/scores")
    shutil.copytree(tmp_path / "scores", tmp_path / "table")
    real = UnitTable.load_state_dict

    def forgetful(self: UnitTable, state: Any) -> None:
        everyone = torch.ones_like(state["alive"])
        real(self, {**state, "alive": everyone, "dropped": ~everyone})  # closed ranks live again

    for lost, owner, load in (("scores", Gradient, lambda self, state: None), ("table", UnitTable, forgetful)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "load_state_dict", load)
            assert dora_train(*words, f"out={tmp_path}/{lost}", "resume=true") == 0
        assert read(tmp_path / "whole/ranks.json") != read(tmp_path / lost / "ranks.json"), lost
