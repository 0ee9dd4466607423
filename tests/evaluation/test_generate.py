"""Where an answer begins, what counts of it, and where it ends."""

import re
from types import SimpleNamespace

import pytest
import torch

from dora_cli.data.token_rows import IGNORED
from dora_cli.evaluation.generate import _cut, answer, last_turn, turn_ends


def test_the_last_learned_stretch_and_all_before_it() -> None:
    tokens = torch.arange(10, 20)
    labels = tokens.clone()
    labels[[0, 1, 4, 5, 8, 9]] = IGNORED  # two turns, and something behind the last
    before, turn = last_turn(tokens, labels)
    assert before.tolist() == [10, 11, 12, 13, 14, 15]
    assert turn.tolist() == [16, 17]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1 then #### 1,234.50", "1234.50"),
        ("so it is #### -12.", "-12"),
        ("it is 7", None),
        ("####", None),
    ],
)
def test_gsm8ks_answer_is_the_number_behind_the_last_mark(text: str, found: str | None) -> None:
    assert answer(text, re.compile(r"####\s*(-?[\d,.]*\d)")) == found


def test_without_a_pattern_all_of_it_counts() -> None:
    assert answer(" a cat\n", None) == "a cat"
    assert answer("yes, 3", re.compile(r"\d")) == "3"
    assert answer("yes", re.compile("no(t)|yes")) is None, "a group that took no part"


def test_nothing_behind_the_end_is_kept() -> None:
    assert _cut([5, 6, 2, 0, 0], [2]) == [5, 6]
    assert _cut([5, 6, 7], [2]) == [5, 6, 7]
    assert _cut([2], [2, 3]) == []


def test_a_turn_ends_at_its_last_token_where_that_is_a_special_one() -> None:
    """A turn that was cut, or ends in a word, says nothing of where to end."""
    tokenizer = SimpleNamespace(added_tokens_decoder={2: "</s>", 4: "<|im_end|>", 7: "<|eot|>"})
    turns = [torch.tensor(turn) for turn in ([11, 4], [12, 13], [7, 12, 4], [2])]
    assert turn_ends(tokenizer, turns) == {4, 2}
    assert turn_ends(tokenizer, []) == set()
