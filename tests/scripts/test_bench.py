"""scripts/bench on tiny shapes: what is compared is comparable, and tables and JSON hold what the scripts say."""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
Bench = Callable[[str], Any]
TINY = ["--model", "tiny", "--batch", "2", "--length", "8", "--rounds", "2", "--device", "cpu"]


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *words])
    script.main()


def assert_narrow(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 80


# --- step.py ----------------------------------------------------------------------------------------------------------


def test_step_times_what_it_is_asked_for(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["floor", "full", "peft_lora", "lora", "dora", "dora_pruned"]
    out = tmp_path / "step.json"
    call(bench("step"), monkeypatch, *TINY, "--dropout", "0", "0.1", "--variants", *variants, "--json", str(out))
    record = json.loads(out.read_text())
    assert list(record["results"]) == ["0.0", "0.1"]
    for results in record["results"].values():
        assert list(results) == variants
        assert all(len(result["seconds"]) == 2 and result["median"] > 0 for result in results.values())
        assert results["dora"]["allocation"] > 0
    assert {"torch", "transformers", "peft", "python"} <= set(record["versions"])
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["settings"]["batch"] == 2
    printed = capsys.readouterr().out
    assert all(variant in printed for variant in variants)
    assert_narrow(printed)


def test_step_takes_every_variant_once_a_round_and_none_always_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = bench("step"), []
    monkeypatch.setattr(step, "make", lambda variant, *_: lambda: taken.append(variant) or 0.0)
    options = step_options(step, rounds=4, variants=("floor", "lora", "dora"))
    step.measure(options)
    rounds = [taken[i : i + 3] for i in range(0, len(taken), 3)]
    assert len(rounds) == 4 + 2, "two rounds warm up"
    assert all(sorted(r) == ["dora", "floor", "lora"] for r in rounds)
    assert Counter(r[0] for r in rounds) == {"floor": 2, "lora": 2, "dora": 2}


def test_the_floor_goes_back_through_every_layer_and_weighs_none(bench: Bench) -> None:
    step = bench("step")
    options = step_options(step)
    base, vocabulary = step.build_base("tiny", torch.float32, torch.device("cpu"))
    reached = []
    layers = [m for m in base.modules() if isinstance(m, torch.nn.Linear)]
    for layer in layers:
        layer.register_full_backward_hook(lambda *_: reached.append(1))
    step.make("floor", base, step.random_batch(vocabulary, options), options)()
    assert len(reached) == len(layers) > 12
    assert all(p.grad is None for p in base.parameters())


def test_the_variants_share_the_frozen_weights_and_full_has_its_own(bench: Bench) -> None:
    step = bench("step")
    options = step_options(step)
    base, vocabulary = step.build_base("tiny", torch.float32, torch.device("cpu"))
    before = {name: p.clone() for name, p in base.named_parameters()}
    twin = step.twin(base)
    assert all(p is q for p, q in zip(base.parameters(), twin.parameters(), strict=True))
    for variant in ("full", "peft_lora", "lora", "dora"):
        step.make(variant, base, step.random_batch(vocabulary, options), options)()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_ranks_and_targets_reach_both_libraries(bench: Bench) -> None:
    step = bench("step")
    base, _ = step.build_base("tiny", torch.float32, torch.device("cpu"))
    targets = step.find_targets(base, ["attention"], exclude=[])
    peft_model, _ = step.peft_model("lora", step.twin(base), targets, 0.0, 5)
    theirs = {n: p.shape[0] for n, p in peft_model.named_parameters() if "lora_A" in n}
    assert set(theirs.values()) == {5} and len(theirs) == len(targets) == 8
    ours = {}
    for variant in ("lora", "dora", "dora_pruned"):
        model = step.twin(base)
        step.our_hooks(variant, model, targets, 0.0, 5)
        ours[variant] = sum(getattr(model.get_submodule(n), "rank", 0) for n in targets)
    assert ours == {"lora": 8 * 5, "dora": 8 * 8, "dora_pruned": 8 * 5}


@pytest.mark.slow
def test_step_measures_the_peak_of_each_variant_in_a_process_of_its_own(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "step.json"
    words = [*TINY, "--dropout", "0", "--variants", "floor", "lora", "--memory", "--json", str(out)]
    call(bench("step"), monkeypatch, *words)
    results = json.loads(out.read_text())["results"]["0.0"]
    assert all(0 <= result["peak_mib"] < 500 for result in results.values())


def step_options(step: ModuleType, **others: Any) -> argparse.Namespace:
    """What step.py's functions read."""
    settings = {
        "model": "tiny", "batch": 2, "length": 8, "rank": 8, "targets": None, "rounds": 1, "device": "cpu",
        "precision": "fp32", "dtype": torch.float32, "checkpointing": False, "compile": False, "current_dropout": 0.0,
    }  # fmt: skip
    return argparse.Namespace(**settings | others)


# --- scaling.py -------------------------------------------------------------------------------------------------------


def test_scaling_changes_one_thing_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling, seen = bench("scaling"), []
    fake = {variant: {"median": 1.0 + i, "ratios": {"floor": 1.0 + i}} for i, variant in enumerate(scaling.VARIANTS)}
    monkeypatch.setattr(scaling.step, "measure", lambda options: seen.append(vars(options).copy()) or fake)
    base = scaling.parse(["--model", "tiny"])
    usual = vars(base).copy()
    changes = {"rank": "rank", "modules": "targets", "length": "length", "width": "model", "batch": "batch"}
    for axis, points in scaling.AXES.items():
        seen.clear()
        results = scaling.measure_axis(axis, points, base)
        assert list(results) == points
        for options in seen:
            assert {k for k in usual if options[k] != usual[k]} <= {changes[axis]}
        assert len({str(options[changes[axis]]) for options in seen}) == len(points)
        assert results[points[0]]["dora"]["ratios"]["floor"] == 1.0 + scaling.VARIANTS.index("dora")


def test_a_width_takes_the_feed_forward_layer_and_the_heads_along(bench: Bench) -> None:
    scaling = bench("scaling")
    options = scaling.parse(["--model", "tiny"])
    scaling.at_width(options, "96")
    base, _ = scaling.step.build_base(options.model, torch.float32, torch.device("cpu"))
    assert (base.config.hidden_size, base.config.intermediate_size, base.config.num_attention_heads) == (96, 384, 3)
    assert base.config.num_hidden_layers == scaling.step.SHAPES["tiny"]["layers"]


def test_scaling_writes_ratios_to_the_floor_of_the_same_point(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scaling.json"
    words = [*TINY, "--axes", "modules", "--points", "query value", "all", "--json", str(out)]
    call(bench("scaling"), monkeypatch, *words)
    record = json.loads(out.read_text())
    assert list(record["results"]["modules"]) == ["query value", "all"]
    for results in record["results"]["modules"].values():
        assert list(results) == ["floor", "peft_lora", "lora", "dora", "dora_pruned"]
        pairs = zip(results["lora"]["seconds"], results["floor"]["seconds"], strict=True)
        assert results["lora"]["ratios"]["floor"] == pytest.approx(statistics.median(a / b for a, b in pairs))
    assert "torch" in record["versions"] and record["settings"]["rank"] == 8
    assert_narrow(capsys.readouterr().out)


def test_points_belong_to_one_axis(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench("scaling").parse(["--axes", "rank", "batch", "--points", "2"])
    assert "name it with --axes" in capsys.readouterr().err


# --- merge.py ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_merge_is_timed_against_copying(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = bench("merge")
    sizes = {"HIDDEN": 16, "INNER": 32, "LAYERS": 2, "LAYERS_PER_SHARD": 1, "VOCABULARY": 50, "RANK": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(merge, name, value)
    out = tmp_path / "merge.json"
    call(merge, monkeypatch, "--folder", str(tmp_path), "--rounds", "1", "--times", "1", "2", "--json", str(out))
    small, large = json.loads(out.read_text())["results"]
    assert (small["shards"], large["shards"]) == (2, 4)
    for result in (small, large):
        assert set(result["median"]) == {"copy", "copy + sync", "merge"}
        assert result["target_seconds"] == pytest.approx(2.5 * result["median"]["copy"] + 4)
        assert result["peak_mib"] > 0 or sys.platform != "linux"
