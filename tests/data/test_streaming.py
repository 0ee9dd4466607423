"""A stream of batches: every row once a pass, shuffled within buffers, and from any position on the same."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from dora_cli.data.batching import LengthGroupedBatches
from dora_cli.data.packing import pack
from dora_cli.data.sources import load_rows
from dora_cli.data.streaming import BatchStream
from dora_cli.data.tasks import build_task
from dora_cli.errors import UserError

BUFFER, SIZE, ROOM = 10, 3, 12


@pytest.fixture(params=[False, True], ids=["rows", "packed"])
def new_stream(request, write, plain_tokenizer):
    """33 rows, of which the first two validate; rows 12 to 21, a whole buffer, leave nothing to learn."""
    answers = ["w1 " * (1 + i % 4) for i in range(33)]
    lines = [{"prompt": "w2 " * (30 if 12 <= i < 22 else 2), "completion": a + f"w{i}"} for i, a in enumerate(answers)]
    path = write("a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    options = {"task": "sft", "name": None, "config": None, "path": str(path), "splits": {}, "columns": {}}
    options |= {"labels": None, "metrics": [], "max_length": ROOM, "cache": None, "template": None, "answer": None}
    options |= {"max_new_tokens": 8, "max_train_samples": None, "max_eval_samples": 2, "holdout": 0.1}
    task = build_task(SimpleNamespace(**options))

    def encode(rows):
        task.fit(rows)
        encoded = task.encode(rows.splits["train"], plain_tokenizer)
        return pack(encoded, ROOM) if request.param else encoded

    def make(seed=1):
        rows = load_rows(SimpleNamespace(**options), offline=True, seed=1, stream=BUFFER)
        return BatchStream(rows, encode, batch_size=SIZE, seed=seed, remember=4)

    return make


def taken(stream, n):
    return [{k: v.tolist() for k, v in batch.items()} for batch, _ in islice(stream.batches(), n)]


def test_the_order_is_that_of_each_buffer_by_itself(new_stream):
    stream = new_stream()
    expected = []
    for buffer, split in [(0, 0), (2, 2), (3, 3), (4, 0)]:  # buffer 1 has nothing to learn, then comes the next pass
        part = list(stream.source.blocks(2))[split]
        encoded = stream.encode(SimpleNamespace(splits={"train": part}, origin={}, stream=stream.source, source=""))
        for rows in LengthGroupedBatches(encoded.lengths, SIZE, 1).epoch(buffer):
            expected.append({k: v.tolist() for k, v in encoded.batch(rows).items()})
    assert taken(stream, len(expected)) == expected
    assert taken(new_stream(2), len(expected)) != expected


def test_from_any_position_on_it_is_the_same(new_stream):
    whole = taken(new_stream(), 16)
    for n in (1, 3, 4, 7, 11):
        stream, again = new_stream(), new_stream()
        taken(stream, n)
        again.restore(json.loads(json.dumps(stream.state())))
        assert taken(again, 16 - n) == whole[n:], n


def test_the_rows_of_the_last_batches_are_known_by_their_place(new_stream):
    stream = new_stream()
    batches = taken(stream, 6)
    for i in range(2, 6):
        for (block, row), tokens in zip(stream.rows_of(i, i + 1), batches[i]["input_ids"], strict=True):
            real = block.encoded[row]["input_ids"].tolist()
            assert tokens[: len(real)] == real
            assert block.where(row).endswith(f", line {block.number(row) + 1}")
    assert stream.rows_of(0, 1) == []


def test_other_data_at_the_position_is_refused(new_stream):
    stream = new_stream()
    taken(stream, 2)
    again = new_stream()
    again.restore(stream.state() | {"digest": "0" * 64})
    with pytest.raises(UserError, match="not the interrupted run's"):
        taken(again, 1)


def test_batches_do_not_touch_the_global_random_state(new_stream):
    before = torch.get_rng_state()
    taken(new_stream(), 5)
    assert torch.equal(before, torch.get_rng_state())
