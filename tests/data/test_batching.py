"""Every row once an epoch, the same order for the same seed and epoch, similar lengths together."""

import multiprocessing
import os
import random
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_cli.data.batching import MEGABATCH, LengthGroupedBatches, batches, sequential_batches
from dora_cli.data.encoded import Encoded

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=300).map(torch.tensor)


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 100))
def test_an_epoch_holds_every_row_once(lengths, size, seed, epoch):
    plan = LengthGroupedBatches(lengths, size, seed)
    made = plan.epoch(epoch)
    assert sorted(row for batch in made for row in batch) == list(range(len(lengths)))
    assert len(made) == len(plan)
    short = [len(batch) for batch in made if len(batch) != size]
    assert short == ([len(lengths) % size] if len(lengths) % size else [])
    assert lengths[made[0]].max() == lengths.max()
    assert made == LengthGroupedBatches(lengths.clone(), size, seed).epoch(epoch)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 20))
def test_evaluation_batches_hold_every_row_once_from_long_to_short(lengths, size):
    made = sequential_batches(lengths, size)
    rows = [row for batch in made for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert lengths[rows].tolist() == sorted(lengths.tolist(), reverse=True)
    assert all(len(batch) == size for batch in made[:-1])
    assert made == sequential_batches(lengths, size)


def test_seed_and_epoch_both_change_the_order():
    sizes = torch.arange(1, 101)
    orders = {
        (seed, epoch): str(LengthGroupedBatches(sizes, 4, seed).epoch(epoch))
        for seed in (0, 1, 2**32, 2**32 + 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == len(orders)


def test_epochs_can_be_entered_in_any_order():
    plan = LengthGroupedBatches(torch.arange(1, 101), 4, 3)
    later = plan.epoch(7)
    assert plan.epoch(0) != later
    assert plan.epoch(7) == later


def test_grouping_saves_most_of_the_padding():
    sizes = torch.randint(1, 100, (MEGABATCH * 8 * 4,), generator=torch.Generator().manual_seed(0))

    def padded(plan):
        return sum(len(batch) * int(sizes[batch].max()) for batch in plan) / int(sizes.sum())

    shuffled = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(1)).split(8)
    assert padded(shuffled) > 1.6
    assert padded(LengthGroupedBatches(sizes, 8, 1).epoch(0)) < 1.05


def test_short_and_long_batches_are_mixed():
    sizes = torch.arange(1, 1601)
    means = [float(sizes[batch].float().mean()) for batch in LengthGroupedBatches(sizes, 8, 1).epoch(0)]
    assert means != sorted(means, reverse=True)
    assert np.corrcoef(range(len(means)), means)[0, 1] == pytest.approx(0, abs=0.2)


@pytest.fixture
def rows():
    tokens = torch.arange(1, 31, dtype=torch.int32)
    offsets = torch.tensor([0, *range(3, 31, 3)])
    return Encoded({"input_ids": tokens}, offsets, {"labels": torch.arange(10)}, {"input_ids": 0})


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_plan(rows, workers):
    plan = [[3, 1], [0, 2, 9], [4], [8, 7]]
    made = list(batches(rows, plan, workers=workers))
    assert len(made) == len(plan)
    for batch, numbers in zip(made, plan, strict=True):
        expected = rows.batch(numbers)
        assert list(batch) == list(expected)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert list(batches(rows, [], workers=workers)) == []


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 20), st.integers(0, 200))
def test_a_run_can_be_entered_at_any_batch(lengths, size, first):
    plan = LengthGroupedBatches(lengths, size, 7)
    epochs = first // len(plan) + 3
    whole = [rows for epoch in range(epochs) for rows in plan.epoch(epoch)]
    ahead = len(plan) + 2
    assert list(islice(plan.stream(first), ahead)) == whole[first : first + ahead]


class Processes:
    """Batches that say which process made them."""

    def __getitems__(self, rows):
        return {"process": torch.tensor([os.getpid()])}


def test_workers_start_once_for_all_epochs_and_end_with_the_stream():
    stream = batches(Processes(), LengthGroupedBatches(torch.ones(10), 4, 1).stream(0), workers=2)
    made = [int(next(stream)["process"]) for _ in range(12)]
    assert len(set(made)) == 2 and os.getpid() not in made
    stream.close()
    assert all(child.pid not in made for child in multiprocessing.active_children())


def test_an_interrupt_of_the_terminal_leaves_workers_alone():
    stream = batches(Processes(), LengthGroupedBatches(torch.ones(10), 4, 1).stream(0), workers=1)
    worker = int(next(stream)["process"])
    os.kill(worker, signal.SIGINT)
    assert {int(next(stream)["process"]) for _ in range(20)} == {worker}
    stream.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_leave_the_global_random_states_alone(rows, workers):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(batches(rows, LengthGroupedBatches(rows.lengths, 2, 1).epoch(0), workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
