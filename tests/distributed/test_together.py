"""Two processes do what one does: the same losses, the same units, the same adapter; and one goes on from the other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.dist
Start = Callable[..., Any]
# 49 rows: the last batch of an epoch has one, fewer than there are processes.
WORDS = ["train.max_steps=14", "train.eval_every=5", "train.log_every=1", "train.save_every=6"]
WORDS += ["data.max_train_samples=49", "adapter.dropout=0", "train.learning_rate=0.01"]
METHODS = {
    "dora": ["method=dora", "budget=r2", "adapter.rank=4", "allocator.interval=2"],
    "adalora": ["method=adalora", "budget=r2", "adapter.rank=4", "allocator.interval=2"],
    "alora": ["method=alora", "budget=r2", "allocator.rounds=2", "allocator.interval=3"],
    "aflora": ["method=aflora", "budget=r2", "allocator.interval=2", "importance.window=2"],
    "increlora": ["method=increlora", "budget=r2", "allocator.interval=2"],
}


def outcome(run: Path) -> tuple[dict[tuple[int, str], float], list[Any], dict[str, torch.Tensor], dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {(r["step"], r["split"]): r["loss"] for r in records if "loss" in r}
    summary = json.loads((run / "summary.json").read_text())
    ranks = [(e["step"], e["alive"], e["ranks"]) for e in json.loads((run / "ranks.json").read_text())]
    return losses, ranks, load_file(run / "adapter/adapter_model.safetensors"), summary


def same(one: Path, other: Path, *, to_the_end: bool = True) -> None:
    losses, ranks, adapter, summary = outcome(one)
    losses2, ranks2, adapter2, summary2 = outcome(other)
    assert ranks2 == ranks
    assert losses2.keys() == losses.keys()
    assert max(abs(losses[key] - losses2[key]) for key in losses) < 1e-5
    assert adapter2.keys() == adapter.keys()
    # New components of IncreLoRA have no gradient but rounding at first, which Adam makes full steps of.
    assert (
        not to_the_end or max(float((values - adapter2[name]).abs().max()) for name, values in adapter.items()) < 1e-5
    )
    for key in ("steps", "samples", "tokens"):
        assert summary2["train"][key] == summary["train"][key], key
    for split, metrics in summary["metrics"].items():
        assert summary2["metrics"][split] == pytest.approx(metrics, abs=1e-5)


@pytest.mark.parametrize(
    "method", ["dora", "adalora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("alora", "aflora", "increlora"))]
)
def test_two_processes_are_one(method: str, start: Start, tmp_path: Path) -> None:
    words = [*WORDS, *METHODS[method]]
    runs = {"one": (1, []), "two": (2, []), "sharded": (2, ["train.shard=full"])}
    for name, (size, more) in runs.items():
        ended = start(*words, *more, f"out={tmp_path}/{name}", size=size).ends()
        assert [e.code for e in ended] == [0] * size, ended[-1].err
        assert all(e.out == "" for e in ended[1:]), "the main process alone speaks"
    for name in ("two", "sharded"):
        same(tmp_path / "one", tmp_path / name, to_the_end=method != "increlora")
    assert outcome(tmp_path / "two")[3]["train"]["processes"] == 2


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on(before: int, after: int, start: Start, tmp_path: Path) -> None:
    words = [*WORDS, *METHODS["dora"], "train.save_every=4"]
    assert start(*words, f"out={tmp_path}/whole", size=1).ends()[0].code == 0
    ended = start(*words, f"out={tmp_path}/cut", size=before, unplugged_at=4).ends()
    assert {e.code for e in ended} != {0}
    ended = start(*words, f"out={tmp_path}/cut", "resume=true", size=after).ends()
    assert [e.code for e in ended] == [0] * after, ended[0].err
    assert "step-00000004" in ended[0].out
    same(tmp_path / "whole", tmp_path / "cut")
