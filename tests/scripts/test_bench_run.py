"""scripts/bench/run.py: both sides see the same data, train alike, and are measured alike."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
Bench = Callable[[str], Any]


def assert_narrow(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 80


@pytest.fixture
def options(bench: Bench, model_dir: Path, data_dir: Path, tmp_path: Path) -> argparse.Namespace:
    words = f"--data {data_dir} --model {model_dir} --rows 40 --batch 8 --eval-batch 8 --max-length 9 --rank 2"
    words += f" --epochs 2 --log-every 2 --rounds 1 --dropout 0.1 --learning-rate 0.01 --folder {tmp_path}"
    return bench("run").parse(words.split())


@pytest.fixture
def data(bench: Bench, options: argparse.Namespace, tmp_path: Path) -> Path:
    folder = tmp_path / "prepared"
    folder.mkdir()
    assert bench("run").prepare(options.data, folder, options) == 40
    return folder


@pytest.fixture
def ours(bench: Bench, options: argparse.Namespace, data: Path, tmp_path: Path) -> Any:
    """The session that dora-train builds from the very command that is timed."""
    from dora_cli.cli.parts import load_parts
    from dora_cli.config.compose import compose
    from dora_cli.training.setup import build

    command = bench("run").our_command("dora", data, tmp_path / "ours", 0.1, 1, options)
    assert command[:3] == [sys.executable, "-m", "dora_cli.cli.train"]
    return build(compose(command[3:], load_parts(), []))


@pytest.fixture
def theirs(bench: Bench, options: argparse.Namespace, data: Path, tmp_path: Path) -> Any:
    """The Trainer that peer.py builds from the very command that is timed."""
    command = bench("run").peer_command(data, tmp_path / "theirs", 0.1, 1, options)
    assert command[:2] == [sys.executable, str(BENCH / "peer.py")]
    peer = bench("peer")
    return peer.build(peer.parse(command[2:]))


def test_both_sides_take_the_very_same_batches(ours: Any, theirs: Any) -> None:
    from dora_cli.data.batching import batches, sequential_batches

    steps = 2 * 40 // 8
    loader = theirs.get_train_dataloader()
    mine, other = [batch for batch, _ in islice(ours.micro_batches(0), steps)], [*loader, *loader]
    assert ours.total_steps == len(mine) == len(other) == steps == theirs.args.num_train_epochs * len(loader)
    validation = ours.encoded["validation"]
    mine += list(batches(validation, sequential_batches(validation.lengths, 8)))
    other += list(theirs.get_eval_dataloader())
    for a, b in zip(mine, other, strict=True):
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(a[name], b[name]), name
    assert len({batch["input_ids"].shape[1] for batch in mine}) > 1, "nothing is padded to a fixed length"


def test_both_sides_train_the_same_modules_at_the_same_rate_with_the_same_optimizer(ours: Any, theirs: Any) -> None:
    adapted = {n.split("base_model.model.")[1] for n, m in theirs.model.named_modules() if hasattr(m, "lora_E")}
    assert adapted == set(ours.targets)
    ranks = {m.lora_A["default"].shape[0] for m in theirs.model.modules() if hasattr(m, "lora_E")}
    assert ranks == set(ours.start_ranks) == {3}
    dropouts = {m.lora_dropout["default"].p for m in theirs.model.modules() if hasattr(m, "lora_E")}
    assert dropouts == {0.1} == {ours.composed.parts["adapter"].dropout}
    trained = {n for n, p in theirs.model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {n.split(".")[-1] for n in trained} == {"weight", "bias"} and len(trained) == 2, "the classifier"
    assert ours.head_modules == ["classifier"]

    steps = ours.total_steps
    theirs.create_optimizer_and_scheduler(steps)
    optimizer = getattr(theirs.optimizer, "optimizer", theirs.optimizer)
    assert type(optimizer) is type(ours.optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"] is ours.optimizer.defaults["fused"] is True
    for key in ("betas", "eps"):
        assert optimizer.defaults[key] == ours.optimizer.defaults[key]
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.01} and ours.config.train.weight_decay == theirs.args.weight_decay
    assert ours.config.train.clip_norm == theirs.args.max_grad_norm
    for _ in range(steps):
        assert theirs.lr_scheduler.get_last_lr()[0] == pytest.approx(ours.scheduler.get_last_lr()[0], rel=1e-9)
        for side, scheduler in ((ours, ours.scheduler), (theirs, theirs.lr_scheduler)):
            side.optimizer.step()  # there are no gradients: nothing moves
            scheduler.step()


def test_the_peer_ends_on_the_budget_and_its_loss_is_the_one_of_dora_eval(
    bench: Bench, theirs: Any, data: Path, options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dora_cli.cli.eval import main as dora_eval

    peer, run = bench("peer"), bench("run")
    calls = []
    allocate = theirs.model.base_model.update_and_allocate
    monkeypatch.setattr(
        theirs.model.base_model, "update_and_allocate", lambda step: calls.append(step) or allocate(step)
    )
    with torch.no_grad():  # so wide open that the random model, too, says something else of every row
        for name, parameter in theirs.model.named_parameters():
            if "lora_E" in name or (parameter.requires_grad and "classifier" in name):
                parameter.normal_(std=3.0)
    theirs.train()
    assert calls == list(range(1, 11)), "once a step, counted from 1"
    evaluated = [record for record in theirs.state.log_history if "eval_cross_entropy" in record]
    assert [record["step"] for record in evaluated] == [5, 10]
    checkpoint = tmp_path / "theirs" / "checkpoint-10"
    assert sorted(p.name for p in checkpoint.parent.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-5"]

    model, logits, labels = theirs.model.eval(), [], []
    with torch.no_grad():
        for batch in theirs.get_eval_dataloader():
            labels.append(batch.pop("labels"))
            logits.append(model(**batch).logits)
    assert torch.cat(logits).std(dim=0).min() > 0.005
    expected = F.cross_entropy(torch.cat(logits), torch.cat(labels)).item()
    assert evaluated[-1]["eval_cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert evaluated[-1]["eval_loss"] > expected + 0.01, "Trainer's own loss contains the penalty"

    words = [*run.task(data, options), f"base={options.model}", f"checkpoint={checkpoint}", f"out={tmp_path / 'eval'}"]
    assert dora_eval(words) == 0
    measured = json.loads((tmp_path / "eval" / "eval-validation.json").read_text())["metrics"]
    assert measured["loss"] == pytest.approx(expected, rel=1e-4)
    assert measured["accuracy"] == pytest.approx(evaluated[-1]["eval_accuracy"])

    file = checkpoint / "adapter_model.safetensors"
    from safetensors.torch import load_file

    kept = {n: t for n, t in load_file(file).items() if "lora_A" in n or "lora_B" in n}
    assert sum(t.shape[0] for n, t in kept.items() if "lora_A" in n) == 2 * 12
    assert run.adapter_parameters(file) == sum(t.numel() for t in kept.values())
    assert peer.INTERVAL == 10


def test_the_data_of_both_sides_are_whole_batches_with_numbered_labels(
    bench: Bench, data: Path, options: argparse.Namespace
) -> None:
    rows = {s: [json.loads(line) for line in (data / f"{s}.jsonl").open()] for s in ("train", "validation")}
    assert len(rows["train"]) == 40 and len(rows["validation"]) == 32
    source = {json.loads(line)["text"]: json.loads(line)["label"] for line in (options.data / "train.jsonl").open()}
    for row in rows["train"]:
        assert row["label"] == ["negative", "positive"].index(source[row["text"]])
    options.rows = 47
    assert bench("run").prepare(options.data, data, options) == 40
    options.rows = 7
    with pytest.raises(SystemExit, match="does not fill a batch of 8"):
        bench("run").prepare(options.data, data, options)


def test_a_process_is_watched_from_its_start_to_its_end(bench: Bench) -> None:
    run = bench("run")
    program = "import time; print('a', flush=True); time.sleep(0.3); print('b', flush=True); time.sleep(0.2)"
    watched = run.watch([sys.executable, "-c", program], run.environment(Path("cache")))
    assert [line for _, line in watched.lines] == ["a", "b"]
    (a, _), (b, _) = watched.lines
    assert b - a >= 0.3 and watched.wall - b >= 0.2 and a > 0
    assert watched.cpu < watched.wall
    with pytest.raises(SystemExit, match="the reason"):
        run.watch([sys.executable, "-c", "import sys; sys.exit('the reason')"], run.environment(Path("cache")))


def test_phases_are_told_by_the_same_steps_of_both_logs(bench: Bench) -> None:
    run = bench("run")
    begin = "the plan says step 3/10 and lr 1"
    ours = [(9.0, begin)] + [(10.0 + k, f"step {k}/11  alive 5/9  loss 0.7  lr 1.00e-03  5 left") for k in (4, 8, 11)]
    theirs = [(14.0, "{'loss': '0.6', 'grad_norm': '1'}"), (16.5, "{'eval_loss': '0.5'}"), (18.0, "{'loss': '0.5'}")]
    for lines in (ours, [*theirs, (19.0, "{'train_runtime': '9', 'train_loss': '1'}")]):
        watched = run.Watched(wall=25.0, cpu=1.0, peak_mib=1.0, lines=lines)
        assert run.phases(watched, steps=11, log_every=4) == (14.0, 4.0, 7.0)


def test_the_log_lines_that_are_looked_for_are_those_printed(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from dora_cli.reporting.terminal import View

    view = View(total_steps=9, start_units=9, most_units=9, final_units="5", metric="accuracy", log=None)
    view.train({"step": 4, "loss": 0.5, "learning_rate": 1e-3, "samples_per_second": 9.0, "alive": 7})
    view.evaluated({"step": 4, "metrics": {"validation": {"loss": 0.5, "accuracy": 0.5}}}, True)
    train, evaluated = capsys.readouterr().out.splitlines()
    assert bench("run").TRAIN_LINE.match(train) and not bench("run").TRAIN_LINE.match(evaluated)


def test_the_comparing_process_holds_no_library_that_a_child_would_inherit(bench: Bench) -> None:
    code = "import sys, run; print([m for m in ('torch', 'numpy', 'transformers', 'datasets') if m in sys.modules])"
    env = {"PYTHONPATH": f"{BENCH}:{BENCH.parents[1]}", "PATH": ""}
    printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_sides_take_turns_and_share_a_round_s_seed(
    bench: Bench, options: argparse.Namespace, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, order = bench("run"), []
    monkeypatch.setattr(run, "warm_up", lambda *_: None)
    monkeypatch.setattr(
        run, "one_run", lambda side, d, dropout, seed, o: order.append((seed, dropout, side)) or made_up(run, 1.0)
    )
    options.rounds, options.method, options.dropout = 2, ["dora", "lora"], [0.0, 0.1]
    results = run.compare(data, options)
    sides = ["dora", "lora", run.PEER]
    assert order == [(seed, dropout, side) for seed in (1, 2) for dropout in (0.0, 0.1) for side in sides]
    assert all(len(runs) == 2 for sides in results.values() for runs in sides.values())


def test_the_table_is_narrow_and_the_record_complete(bench: Bench, options: argparse.Namespace) -> None:
    run = bench("run")
    sides = {
        "weight_decomposed": [made_up(run, w) for w in (9000.0, 1000.0, 5000.0)],
        run.PEER: [made_up(run, 10000.0)],
    }
    text = run.table(sides)
    assert_narrow(text)
    assert "5000.0  0.50" in text.splitlines()[1], "the median, and its ratio to the peer"
    record = json.loads(json.dumps(run.record({"0.1": sides}, options)))
    assert {"processor", "cores", "OMP_NUM_THREADS"} == set(record["machine"])
    assert {"python", "torch", "transformers", "peft", "accelerate", "datasets"} == set(record["versions"])
    mine = record["results"]["0.1"]["weight_decomposed"]
    assert mine["ratio"] == 0.5 and mine["median"]["wall"] == 5000.0 and len(mine["runs"]) == 3
    assert record["settings"]["rank"] == 2


def made_up(run: ModuleType, wall: float) -> Any:
    return run.Run(
        wall=wall, begin=12.0, steps=wall - 20, end=8.0, cpu=9.0, own_seconds=wall - 20, peak_mib=12345.0,
        optimizer_steps=11, params=1234567, loss=0.31, accuracy=0.9, own_loss=0.31,
    )  # fmt: skip


@pytest.mark.slow
def test_a_whole_comparison_runs_and_both_sides_agree_with_dora_eval(
    bench: Bench, options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.json"
    words = f"--data {options.data} --model {options.model} --rows 40 --batch 8 --rank 2 --log-every 2 --rounds 1"
    words += " --max-length 16"
    monkeypatch.setattr(sys, "argv", ["run", *words.split(), "--dropout", "0.1", "--json", str(out)])
    bench("run").main()
    for side, result in json.loads(out.read_text())["results"]["0.1"].items():
        (run,) = result["runs"]
        assert run["optimizer_steps"] == 10
        assert run["loss"] == pytest.approx(run["own_loss"], abs=1e-4), side
        assert run["wall"] == pytest.approx(run["begin"] + run["steps"] + run["end"])
        assert 0 < run["own_seconds"] < run["wall"]
        assert run["params"] > 0
