"""Tokens come back as the tokenizer made them, in whatever way they were asked for, and what was cut is counted."""

import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dora_cli.data import tokens
from dora_cli.data.tokens import CHUNK, tokenize
from dora_cli.errors import UserError

LONG = " ".join(f"w{i}" for i in range(20))
words = st.integers(0, 14).map(lambda n: " ".join(f"w{i}" for i in range(n)))


def encode(tokenizer, texts, pairs=None, max_length=16, **options):
    return tokenize(texts, pairs, tokenizer, max_length=max_length, scalars={}, **options)


@pytest.fixture
def own_class(tokenizer):
    """The same tokenizer with a class that has a say in what it does, so that it must be asked itself."""

    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args, **kwargs):
            return super()._encode_plus(*args, **kwargs)

    tokenizer.__class__ = Own
    return tokenizer


def test_examples_are_what_the_tokenizer_says(tokenizer):
    texts, pairs = ["w1 w2 w3", "w4", ""], ["w5", "w6 w7", "w8"]
    encoded = encode(tokenizer, texts, pairs)
    assert len(encoded) == 3 and encoded.truncated == 0
    for i, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        expected = tokenizer(text, pair)
        assert encoded[i]["input_ids"].tolist() == expected["input_ids"]
        assert encoded[i]["token_type_ids"].tolist() == expected["token_type_ids"]
        assert encoded.lengths[i] == len(expected["input_ids"])
    assert {column.dtype for column in encoded.ragged.values()} == {torch.int32}


def test_long_rows_are_cut_as_the_tokenizer_cuts_and_counted(tokenizer):
    texts, pairs = [LONG, "w1", LONG], ["w1 w2", "w2", LONG]
    encoded = encode(tokenizer, texts, pairs, max_length=12)
    assert encoded.truncated == 2
    assert encoded.lengths.tolist() == [12, 5, 12]
    for i in (0, 2):
        expected = tokenizer(texts[i], pairs[i], truncation=True, max_length=12)["input_ids"]
        assert encoded[i]["input_ids"].tolist() == expected


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words, st.none() | words, st.integers(5, 20), st.sampled_from(["left", "right"]), st.booleans())
def test_every_cut_is_the_tokenizers_own(tokenizer, plain_tokenizer, text, pair, most, side, plain):
    asked = plain_tokenizer if plain else tokenizer
    asked.truncation_side = side
    encoded = encode(asked, [text], None if pair is None else [pair], max_length=most)
    first = f"{text}\n" if plain and pair is not None else text
    own = asked([first], None if pair is None else [pair], truncation=True, max_length=most)
    assert encoded[0]["input_ids"].tolist() == (own["input_ids"][0] or [asked.eos_token_id])
    if not plain:
        assert encoded[0]["token_type_ids"].tolist() == own["token_type_ids"][0]


@pytest.mark.parametrize("pairs", [None, ["w1", LONG, "", "w3"]])
def test_a_tokenizer_of_its_own_class_is_asked_itself(tokenizer, own_class, pairs):
    texts = ["w1 w2", LONG, f"{LONG} w1", "w4"]
    theirs = encode(own_class, texts, pairs)
    tokenizer.__class__ = PreTrainedTokenizerFast
    ours = encode(tokenizer, texts, pairs)
    assert ours.truncated == theirs.truncated == 2
    assert torch.equal(ours.offsets, theirs.offsets)
    assert all(torch.equal(ours.ragged[name], theirs.ragged[name]) for name in ("input_ids", "token_type_ids"))


def test_a_tokenizer_written_in_python_is_asked_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "CACHED_FROM", 0)
    texts, pairs = ["good", "a bad and much too long text"], ["so", "said they"]
    encoded = encode(ByT5Tokenizer(), texts, pairs, max_length=12, cache=tmp_path / "cache")
    own = ByT5Tokenizer()(texts, pairs, truncation=True, max_length=12)["input_ids"]
    assert [encoded[i]["input_ids"].tolist() for i in range(2)] == own
    assert encoded.truncated == 1
    assert not (tmp_path / "cache").exists()  # nobody can tell what its tokens depend on


@pytest.mark.parametrize("split", [True, False])
def test_what_the_tokenizer_was_set_to_before_does_not_matter(tokenizer, split):
    texts = ["w1[SEP]w2", LONG]
    tokenizer.split_special_tokens = split
    expected = tokenizer(texts, truncation=True, max_length=16)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=30)
    tokenizer.backend_tokenizer.encode_special_tokens = not split
    encoded = encode(tokenizer, texts)
    assert [encoded[i]["input_ids"].tolist() for i in range(2)] == expected
    assert encoded.truncated == 1


def test_two_long_texts_cost_no_more_than_their_length(tokenizer):
    text = " ".join(["w1"] * 3000)  # the tokenizer's own cut would keep 1,500 × 1,500 pairs of pieces
    start = time.process_time()
    encoded = encode(tokenizer, [text], [text], max_length=7)
    assert time.process_time() - start < 1
    assert encoded[0]["input_ids"].tolist() == [2, 6, 6, 3, 6, 6, 3]


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

    vocabulary = models.WordLevel({"[UNK]": 0, "w1": 1, "w2": 2, "\n": 3}, unk_token="[UNK]")
    backend = Tokenizer(vocabulary)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" |\n"), "isolated")
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]", eos_token="[UNK]")
    assert encode(plain, ["w1"], ["w2"])[0]["input_ids"].tolist() == [1, 3, 2]
    assert encode(plain, ["w1"])[0]["input_ids"].tolist() == [1]
    assert encode(tokenizer, ["w1"], ["w2"])[0]["input_ids"].tolist() == [2, 6, 3, 7, 3]  # has its own


def test_a_text_without_tokens_still_has_one(plain_tokenizer):
    encoded = encode(plain_tokenizer, ["", "w1"])
    assert encoded[0]["input_ids"].tolist() == [plain_tokenizer.eos_token_id]
    assert encoded.lengths.tolist() == [1, 1]
    assert encoded.batch([0])["attention_mask"].tolist() == [[1]]


@pytest.mark.parametrize("characters", [tokens.CHUNK_CHARACTERS, 700, 1])
def test_more_rows_than_are_tokenised_at_once_stay_in_order(tokenizer, monkeypatch, characters):
    monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", characters)
    texts = [f"w{i % 40}" for i in range(CHUNK + 5)]
    encoded = encode(tokenizer, texts, texts[::-1])
    assert encoded.ragged["input_ids"].view(-1, 5)[:, 1].tolist() == [5 + i % 40 for i in range(len(texts))]
    assert encoded.ragged["input_ids"].view(-1, 5)[:, 3].tolist() == [5 + i % 40 for i in reversed(range(len(texts)))]
