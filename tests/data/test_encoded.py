"""Tokens come back as the tokenizer made them, padding is as long as the longest row, and what was cut is counted."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_cli.data.encoded import CHUNK, Encoded, tokenize
from dora_cli.errors import UserError


def encode(tokenizer, texts, pairs=None, max_length=16, **scalars):
    return tokenize(texts, pairs, tokenizer, max_length=max_length, scalars=scalars)


def test_examples_are_what_the_tokenizer_says(tokenizer):
    texts, pairs = ["w1 w2 w3", "w4", ""], ["w5", "w6 w7", "w8"]
    encoded = encode(tokenizer, texts, pairs)
    assert len(encoded) == 3 and encoded.truncated == 0
    for i, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        expected = tokenizer(text, pair)
        assert encoded[i]["input_ids"].tolist() == expected["input_ids"]
        assert encoded[i]["token_type_ids"].tolist() == expected["token_type_ids"]
        assert encoded.lengths[i] == len(expected["input_ids"])


def test_a_batch_is_as_long_as_its_longest_row_and_masks_the_padding(tokenizer):
    labels = torch.tensor([3, 1])
    encoded = encode(tokenizer, ["w1", "w2 w3 w4"], labels=labels)
    batch = encoded.collate([encoded[0], encoded[1]])
    assert batch["input_ids"].tolist() == [[2, 6, 3, 0, 0], [2, 7, 8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0] * 5] * 2
    assert batch["labels"].tolist() == [3, 1]
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_padding_stands_on_the_tokenizers_side(plain_tokenizer):
    plain_tokenizer.padding_side = "left"
    encoded = encode(plain_tokenizer, ["w1", "w2 w3 w4"])
    batch = encoded.collate([encoded[0], encoded[1]])
    assert batch["input_ids"].tolist() == [[0, 0, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert "token_type_ids" not in batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_agrees_with_the_tokenizers_own(tokenizer, side):
    tokenizer.padding_side = side
    texts = ["w1 w2", "w3", "w4 w5 w6 good bad"]
    encoded = encode(tokenizer, texts, texts[::-1])
    ours = encoded.collate([encoded[i] for i in range(3)])
    theirs = tokenizer(texts, texts[::-1], padding=True, return_tensors="pt")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_long_rows_are_cut_as_the_tokenizer_cuts_and_counted(tokenizer):
    long = " ".join(f"w{i}" for i in range(20))
    texts, pairs = [long, "w1", long], ["w1 w2", "w2", long]
    encoded = encode(tokenizer, texts, pairs, max_length=12)
    assert encoded.truncated == 2
    assert encoded.lengths.tolist() == [12, 5, 12]
    for i in (0, 2):
        expected = tokenizer(texts[i], pairs[i], truncation=True, max_length=12)["input_ids"]
        assert encoded[i]["input_ids"].tolist() == expected


def test_a_row_of_exactly_the_length_is_not_cut(tokenizer):
    assert encode(tokenizer, ["w1 w2 w3"], max_length=5).truncated == 0
    assert encode(tokenizer, ["w1 w2 w3"], max_length=4).truncated == 1


@pytest.mark.parametrize(("pairs", "least"), [(None, 3), (["w1"], 5)])
def test_a_length_without_room_for_text_is_refused(tokenizer, pairs, least):
    assert encode(tokenizer, ["w1 w2 w3"], pairs, max_length=least).lengths.tolist() == [least]
    with pytest.raises(UserError, match=f"data.max_length={least - 1} leaves no room"):
        encode(tokenizer, ["w1"], pairs, max_length=least - 1)


def test_a_tokenizer_without_separator_gets_a_line_break_between_two_texts(tokenizer):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "w1": 1, "w2": 2, "\n": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(" |\n"), "isolated")
    plain = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]", eos_token="[UNK]")
    assert encode(plain, ["w1"], ["w2"])[0]["input_ids"].tolist() == [1, 3, 2]
    assert encode(plain, ["w1"])[0]["input_ids"].tolist() == [1]
    assert encode(tokenizer, ["w1"], ["w2"])[0]["input_ids"].tolist() == [2, 6, 3, 7, 3]  # has its own


def test_a_text_without_tokens_still_has_one(plain_tokenizer):
    encoded = encode(plain_tokenizer, ["", "w1"])
    assert encoded[0]["input_ids"].tolist() == [plain_tokenizer.eos_token_id]
    assert encoded.collate([encoded[0]])["attention_mask"].tolist() == [[1]]


def test_more_rows_than_are_tokenised_at_once_stay_in_order(tokenizer):
    texts = [f"w{i % 40}" for i in range(CHUNK + 5)]
    encoded = encode(tokenizer, texts)
    assert [encoded[i]["input_ids"][1].item() for i in range(len(texts))] == [5 + i % 40 for i in range(len(texts))]


def test_it_travels_to_worker_processes(tokenizer):
    encoded = encode(tokenizer, ["w1 w2"], labels=torch.tensor([1]))
    again = pickle.loads(pickle.dumps(encoded))
    assert torch.equal(again.ragged["input_ids"], encoded.ragged["input_ids"])
    assert pickle.loads(pickle.dumps(encoded.collate))([encoded[0]])["labels"].tolist() == [1]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=8),
    st.sampled_from(["left", "right"]),
)
def test_unpadding_a_batch_gives_the_rows_back(rows, side):
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    encoded = Encoded({"input_ids": flat}, offsets, {}, {"input_ids": 0}, side)
    batch = encoded.collate([encoded[i] for i in range(len(rows))])
    assert batch["input_ids"].shape == (len(rows), max(map(len, rows)))
    for row, tokens, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert tokens[mask.bool()].tolist() == row
        assert tokens[~mask.bool()].sum() == 0
