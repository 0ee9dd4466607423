"""Batches are the rows, padded to the longest and masked."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_cli.data.encoded import Encoded
from dora_cli.data.tokens import tokenize

token_rows = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=8)
sides = st.sampled_from(["left", "right"])


def make(rows, side="right"):
    """Rows of tokens, a second column of the tokens' negatives, and labels that count from 0."""
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    pads = {"input_ids": 0, "other": 7}
    return Encoded({"input_ids": flat, "other": -flat}, offsets, {"labels": torch.arange(len(rows))}, pads, side)


def encode(tokenizer, texts, pairs=None, **scalars):
    return tokenize(texts, pairs, tokenizer, max_length=16, scalars=scalars)


def test_a_batch_is_as_long_as_its_longest_row_and_masks_the_padding(tokenizer):
    labels = torch.tensor([3, 1])
    batch = encode(tokenizer, ["w1", "w2 w3 w4"], labels=labels).batch([0, 1])
    assert batch["input_ids"].tolist() == [[2, 6, 3, 0, 0], [2, 7, 8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0] * 5] * 2
    assert batch["labels"].tolist() == [3, 1]
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_padding_stands_on_the_tokenizers_side(plain_tokenizer):
    plain_tokenizer.padding_side = "left"
    batch = encode(plain_tokenizer, ["w1", "w2 w3 w4"]).batch([0, 1])
    assert batch["input_ids"].tolist() == [[0, 0, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert "token_type_ids" not in batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_agrees_with_the_tokenizers_own(tokenizer, side):
    tokenizer.padding_side = side
    texts = ["w1 w2", "w3", "w4 w5 w6 good bad"]
    ours = encode(tokenizer, texts, texts[::-1]).batch([0, 1, 2])
    theirs = tokenizer(texts, texts[::-1], padding=True, return_tensors="pt")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@settings(max_examples=100, deadline=None)
@given(token_rows, sides, st.data())
def test_a_batch_is_every_row_put_into_padding(rows, side, data):
    encoded = make(rows, side)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
    batch = encoded.batch(chosen)
    shape = (len(chosen), max(len(rows[i]) for i in chosen))
    expected = {name: torch.full(shape, pad) for name, pad in {"input_ids": 0, "other": 7, "attention_mask": 0}.items()}
    for line, i in enumerate(chosen):
        where = slice(0, len(rows[i])) if side == "right" else slice(shape[1] - len(rows[i]), shape[1])
        expected["input_ids"][line, where] = encoded[i]["input_ids"].long()
        expected["other"][line, where] = encoded[i]["other"].long()
        expected["attention_mask"][line, where] = 1
    expected["labels"] = torch.tensor(chosen)
    assert list(batch) == list(expected)
    for name, values in expected.items():
        assert torch.equal(batch[name], values) and batch[name].dtype == values.dtype and batch[name].is_contiguous()


@settings(max_examples=50, deadline=None)
@given(token_rows, sides)
def test_unpadding_a_batch_gives_the_rows_back(rows, side):
    batch = make(rows, side).batch(range(len(rows)))
    for row, tokens, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert tokens[mask.bool()].tolist() == row
        assert tokens[~mask.bool()].sum() == 0


def test_changing_a_batch_leaves_the_rows_alone():
    encoded = make([[1, 2], [3, 4]])
    for values in encoded.batch([0, 1]).values():
        values.zero_()
    assert encoded.batch([1])["input_ids"].tolist() == [[3, 4]]
    assert encoded.batch([1])["labels"].tolist() == [1]


def test_it_travels_to_worker_processes(tokenizer):
    encoded = encode(tokenizer, ["w1 w2"], labels=torch.tensor([1]))
    again = pickle.loads(pickle.dumps(encoded))
    assert torch.equal(again.ragged["input_ids"], encoded.ragged["input_ids"])
    assert again.batch([0])["labels"].tolist() == [1]
