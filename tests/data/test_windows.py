"""Windows, their answers and their characters are those of transformers' own overflow, for any kind of tokenizer."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_cli.data.windows import SCALARS, Asked, Unfit, cut_windows
from dora_cli.errors import UserError

SPECIAL = ["<pad>", "<unk>", "<cls>", "<sep>"]
TEMPLATES = {
    "bert": "<cls> $A <sep> $B:1 <sep>:1",
    "roberta": "<cls> $A <sep> <sep> $B <sep>",
    "xlnet": "$A <sep> $B:1 <sep>:1 <cls>:2",
    "t5": "$A <sep> $B <sep>",
    "gpt": None,
}


def build(kind: str) -> Any:
    """Bytes as tokens, a word's first joined to the space before it; for BERT whole words, which spaces part."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if kind == "bert":
        words = {w: i for i, w in enumerate([*SPECIAL, *(f"w{i}" for i in range(30)), "."])}
        rust = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        rust.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters, "Ġw"])}
        rust = Tokenizer(models.BPE(vocabulary, [("Ġ", "w")]))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if TEMPLATES[kind]:
        rust.post_processor = processors.TemplateProcessing(
            single="$A <sep>", pair=TEMPLATES[kind], special_tokens=[("<cls>", 2), ("<sep>", 3)]
        )
    names = ["input_ids", *(["token_type_ids"] if kind in ("bert", "xlnet") else []), "attention_mask"]
    cls = {"cls_token": "<cls>"} if kind not in ("gpt", "t5") else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        unk_token="<unk>",
        pad_token="<pad>",
        sep_token=AddedToken("<sep>", special=True),
        model_input_names=names,
        padding_side="left" if kind == "xlnet" else "right",
        **cls,
    )


def questions(n: int) -> list[Asked]:
    draw, rows = random.Random(0), []
    for _ in range(n):
        words = [f"w{draw.randint(0, 29)}" for _ in range(draw.randint(1, 60))]
        context = " ".join(words) + " ."
        first = draw.randrange(len(words))
        last = min(first + draw.randint(0, 4), len(words) - 1)
        start = len(" ".join(words[:first])) + (first > 0)
        span = (start, len(" ".join(words[: last + 1])))
        rows.append(Asked(" ".join(words[: draw.randint(1, 4)]) + "?", context, span if draw.random() < 0.8 else None))
    return rows


def reference(row: Asked, tokenizer: Any, length: int, overlap: int) -> list[dict[str, Any]]:
    """As transformers' example prepares SQuAD, with its own cut."""
    made = tokenizer(
        row.question,
        row.context,
        truncation="only_second",
        max_length=length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for i, ids in enumerate(made["input_ids"]):
        texts, chars = made.sequence_ids(i), made["offset_mapping"][i]
        null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id is not None else 0
        inside = [t for t, text in enumerate(texts) if text == 1]
        start = end = null
        if row.span and chars[inside[0]][0] <= row.span[0] and chars[inside[-1]][1] >= row.span[1]:
            start = max(t for t in inside if chars[t][0] <= row.span[0])
            end = min(t for t in inside if chars[t][1] >= row.span[1])
        windows.append({"ids": ids, "null": null, "start": start, "end": end, "chars": [chars[t] for t in inside]})
        windows[-1]["types"] = made["token_type_ids"][i] if "token_type_ids" in made else None
    return windows


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("overlap", [0, 7])
def test_windows_are_those_of_transformers(kind: str, overlap: int) -> None:
    tokenizer, rows = build(kind), questions(60)
    types = "token_type_ids" in tokenizer.model_input_names
    made = cut_windows(rows, tokenizer, max_length=40, overlap=overlap, types=types)
    break_ends = "\n" if kind == "gpt" else ""
    expected = [
        (i, w)
        for i, row in enumerate(rows)
        for w in reference(row._replace(question=row.question + break_ends), tokenizer, 40, overlap)
    ]
    assert len(made["offsets"]) - 1 == len(expected) > len(rows)
    answered = 0
    for i, (number, wanted) in enumerate(expected):
        span = slice(int(made["offsets"][i]), int(made["offsets"][i + 1]))
        got = {name: int(made[name][i]) for name in SCALARS}
        assert made["input_ids"][span].tolist() == wanted["ids"]
        assert not types or made["token_type_ids"][span].tolist() == wanted["types"]
        assert got["row"] == number
        assert (got["null"], got["start"], got["end"]) == (wanted["null"], wanted["start"], wanted["end"])
        begin = int(made["char_offsets"][number]) + got["skipped"]
        there = slice(begin, begin + got["size"])
        chars = list(zip(made["char_starts"][there].tolist(), made["char_ends"][there].tolist(), strict=True))
        assert chars == wanted["chars"]
        answered += wanted["start"] != wanted["null"]
    assert 0.3 * len(rows) < answered < len(expected)


def test_what_leaves_no_room() -> None:
    from tokenizers import normalizers

    tokenizer = build("bert")
    rows = [Asked("w1 w2", "w3 w4 w5 w6", None), Asked("w1 " * 6, "w3 w4", None), Asked("w1 " * 6, "w3 " * 9, None)]
    with pytest.raises(UserError, match="leaves no room for a question and more than 6 tokens of the context"):
        cut_windows(rows, tokenizer, max_length=10, overlap=6, types=True)
    with pytest.raises(Unfit, match="its question has 6 tokens and leaves 2 of data") as refused:
        cut_windows(rows, tokenizer, max_length=11, overlap=2, types=True)
    assert refused.value.row == 2
    fitting = cut_windows(rows[:2], tokenizer, max_length=11, overlap=2, types=True)
    assert torch.equal(fitting["size"], torch.tensor([4, 2]))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("w9", "")
    with pytest.raises(Unfit, match="no token of its answer"):
        cut_windows([Asked("w1", "w2 w9", (3, 5))], tokenizer, max_length=11, overlap=2, types=True)


def test_a_tokenizer_that_does_not_say_where_tokens_come_from() -> None:
    with pytest.raises(UserError, match="does not say where in the text its tokens come from"):
        cut_windows([Asked("w1", "w2", None)], SimpleNamespace(is_fast=False), max_length=11, overlap=2, types=False)
