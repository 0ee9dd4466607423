"""The estimate of a run's memory: the same bytes as a step that computes, and nothing left behind."""

import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_cli.cli.parts import load_parts
from dora_cli.config.compose import compose
from dora_cli.training import memory
from dora_cli.training.memory import MemoryEstimate, NoEstimate, estimate
from dora_cli.training.plan import describe
from dora_cli.training.setup import Session, build

Built = Callable[..., Session]
MIB = 2**20


@pytest.fixture
def built(model_dir: Path, data_dir: Path) -> Built:
    """A session on the tiny model, with further overrides."""

    def make(*overrides: str) -> Session:
        words = {
            "recipe": "text_classification",
            "method": "lora",
            "model.name": str(model_dir),
            "data.path": str(data_dir),
            "data.max_length": 16,
            "train.batch_size": 8,
            "train.device": "cpu",
        } | dict(word.split("=", 1) for word in overrides)
        return build(compose([f"{key}={value}" for key, value in words.items()], load_parts()))

    return make


def real_peak(session: Session) -> int:
    """The most bytes alive in two steps and an evaluation that do compute."""
    model, config, encoded = session.model, session.config.train, session.encoded["train"]
    longest = int(encoded.lengths.argmax())
    live = memory._Live(torch.device("cpu"))
    live.leave_out([*model.parameters(), *model.buffers()])
    model.train()
    with live:
        for _ in range(2):
            for _ in range(min(config.accumulation, 2)):
                batch = {k: v.clone() for k, v in encoded.batch([longest] * config.batch_size).items()}
                with memory.autocast(session.device, session.autocast_dtype):
                    loss = session.task.loss(model, batch).total
                (loss / config.batch_size).backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
            session.optimizer.step()
            session.optimizer.zero_grad(set_to_none=True)
    return live.peak


@pytest.mark.parametrize(
    "options",
    [
        ["method=lora", "budget=r4"],
        ["method=dora", "budget=r4", "adapter.dropout=0.1", "train.accumulation=3"],
        ["method=full"],
        pytest.param(["method=full", "train.accumulation=2"], marks=pytest.mark.slow),
        pytest.param(["method=mora", "budget=r2"], marks=pytest.mark.slow),
        ["method=lora", "budget=r4", "train.gradient_checkpointing=true"],
        pytest.param(["method=lora", "budget=r4", "train.precision=bf16"], marks=pytest.mark.slow),
    ],
    ids=lambda options: " ".join(options),
)
def test_a_step_that_computes_nothing_holds_the_bytes_of_one_that_does(options: list[str], built: Built) -> None:
    session = built(*options, "train.batch_size=32", "train.eval_batch_size=1")
    found = estimate(session)
    trained = memory._bytes(session.trained_parameters().values())
    # Random states and scalars, 4 KiB; an activation of a layer is 32 KiB or more.
    assert found.activations + found.trained - trained == pytest.approx(real_peak(session), abs=6000)


def test_gradient_checkpointing_is_seen_to_need_less(built: Built) -> None:
    session = built("budget=r4", "train.batch_size=64", "train.eval_batch_size=1")
    plain = estimate(session)
    frugal = estimate(
        built("budget=r4", "train.batch_size=64", "train.eval_batch_size=1", "train.gradient_checkpointing=true")
    )
    assert frugal.activations < 0.8 * plain.activations
    assert estimate(session, checkpointing=True).activations == frugal.activations


def test_trained_parameters_count_four_times_and_frozen_ones_once(built: Built) -> None:
    session = built("method=full")
    found = estimate(session)
    weights = sum(p.nbytes for p in session.model.parameters())
    # weight, gradient and two moments; beside them AdamW's step counters, 4 bytes a tensor
    assert found.trained == 4 * weights + 4 * len(list(session.model.parameters()))
    assert found.base == sum(b.nbytes for b in session.model.buffers())


def test_evaluation_counts_where_it_needs_more(built: Built) -> None:
    found = estimate(built("budget=r4", "train.batch_size=1", "train.eval_batch_size=32"))
    assert (found.moment, found.rows) == ("evaluation", 32)
    assert estimate(built("budget=r4", "train.batch_size=32")).moment == "training"


@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_an_estimate_leaves_no_trace(dropout: str, built: Built) -> None:
    options = ["method=dora", "budget=r4", f"adapter.dropout={dropout}"]
    session, other = built(*options), built(*options)
    before = {name: p.clone() for name, p in session.model.named_parameters()}
    states = torch.get_rng_state(), random.getstate()
    estimate(session)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    for name, parameter in session.model.named_parameters():
        assert torch.equal(before[name], parameter), name
        assert parameter.grad is None
    assert not session.optimizer.state
    batch = session.encoded["train"].batch([0, 1, 2])
    for mode in (True, False):
        losses = []
        for one in (session, other):
            torch.manual_seed(0)
            one.model.train(mode)
            losses.append(one.task.loss(one.model, batch).total)
        assert torch.equal(*losses)


def test_what_cannot_be_followed_is_said_in_one_line_and_leaves_no_gradients(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = built("budget=r4", "dry_run=true", "train.accumulation=2")
    real, calls = session.task.loss, []

    def loss(model: Any, batch: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:  # gradients of the first micro-batch are there
            raise RuntimeError("a kernel without shapes\nand much more")
        return real(model, batch)

    monkeypatch.setattr(session.task, "loss", loss)
    with pytest.raises(NoEstimate, match=r"^RuntimeError: a kernel without shapes$"):
        estimate(session)
    assert all(p.grad is None for p in session.model.parameters())
    calls.clear()
    assert (
        describe(session, "out")
        .sections["memory"]["here"]
        .startswith("no estimate can be given (RuntimeError: a kernel")
    )


def test_a_model_that_asks_for_values_is_followed(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    session = built("budget=r4")
    real = session.task.loss

    def loss(model: Any, batch: Any) -> Any:
        if batch["attention_mask"].bool().all():  # as models do to leave out a mask
            return None
        return real(model, batch)

    monkeypatch.setattr(session.task, "loss", loss)
    assert estimate(session).activations > 0


def test_the_dry_run_shows_it_and_a_run_does_not_wait_for_it(built: Built) -> None:
    shown = describe(built("budget=r4", "dry_run=true"), "out").sections["memory"]
    assert "GiB at the peak, in training" in shown["here"] and "(8 × " in shown["here"]
    assert re.fullmatch(r"1 device \(\d+ MiB each\)", shown["24 GB"])
    assert "memory" not in describe(built("budget=r4"), "out").sections


def test_the_parts_add_up_and_a_device_shows_no_process() -> None:
    gib = 2**30
    found = MemoryEstimate("cuda", 0, 2 * gib, gib // 2, gib, 0, rows=32, tokens=64, moment="training")
    assert found.total == 3.5 * gib
    assert found.sentence().startswith("3.50 GiB at the peak on cuda, in training: 2.00 base, 0.50 trained")
    assert "gaps" not in found.sentence()


def test_live_bytes_count_every_storage_once_and_views_not_at_all() -> None:
    live = memory._Live(torch.device("cpu"))
    with live:
        x = torch.zeros(1000)
        y = x.view(10, 100)[2:].t()
        assert live.now == 4000
        z = x + 1
        del x
        assert live.now == 8000, "the view still holds the first"
        del y
        assert live.now == 4000
        z.mul_(2)
        del z
    assert (live.now, live.peak) == (0, 8000)


@pytest.mark.skipif(not memory._Heap.speaks(), reason="this C library does not tell the size of its heap")
def test_the_heap_grows_by_what_it_hands_out_without_making_it_resident() -> None:
    """In a process of its own: a heap with holes, as earlier tests leave it, grows by less."""
    code = """
from dora_cli.training import memory

MIB = 2**20
heap = memory._Heap()
before = memory.resident_bytes()
blocks = [heap.take(100 * MIB) for _ in range(3)]
assert 300 * MIB <= heap.growth() < 301 * MIB, heap.growth()
assert memory.resident_bytes() - before < 4 * MIB
for block in blocks:
    heap.give_back(block)
assert heap.growth() < MIB, heap.growth()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is mapped")
def test_weights_in_a_mapped_file_count_until_they_are_read(tmp_path: Path) -> None:
    torch.ones(8 * MIB).numpy().tofile(tmp_path / "weights")
    mapped = torch.from_file(str(tmp_path / "weights"), size=8 * MIB)
    assert 31 * MIB <= memory.unread_bytes([mapped[: 4 * MIB], mapped[4 * MIB :]]) <= 32 * MIB
    mapped[: 4 * MIB].sum()
    assert 14 * MIB <= memory.unread_bytes([mapped]) <= 18 * MIB
    assert memory.unread_bytes([torch.ones(8 * MIB)]) == 0
