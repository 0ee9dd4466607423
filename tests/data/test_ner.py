"""Which token carries the tag of which word; and what is refused."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dora_cli.data.sources import ROW, Rows
from dora_cli.data.tasks import build_task
from dora_cli.data.token_rows import IGNORED
from dora_cli.errors import UserError

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "wal", "##king", "##s", "to", "u", ".", "s", "par", "##is", "##,", ","]
WORDS, TAGS = ["walkings", "to", "U.S.", "paris,"], ["O", "O", "B-LOC", "B-LOC"]


def wordpiece() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    rust = Tokenizer(models.WordPiece({word: i for i, word in enumerate(PIECES)}, unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=rust, model_input_names=names, **special)


def byte_level(trim: bool) -> Any:
    """As RoBERTa's (``trim``) or GPT-2's: a word is joined to the space before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, "Ġt", "</s>"])}, [("Ġ", "t")]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="</s>", eos_token="</s>")


def metaspace() -> Any:
    """As Llama's and T5's: the space may be a token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<unk>", "▁", "▁to", *"walkingstopr.U,S"]
    rust = Tokenizer(models.Unigram([(word, -1.0) for word in vocabulary], unk_id=1))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture
def build(fitted: Any) -> Any:
    """The task fitted to such rows, and the rows."""
    return partial(fitted, "ner", max_length=64)


def tagged(task: Any, encoded: Any, tokenizer: Any, row: int = 0) -> list[str]:
    """Every token, with its tag where it carries one."""
    example = encoded[row]
    words = tokenizer.convert_ids_to_tokens(example["input_ids"].tolist())
    labels = example["labels"].tolist()
    return [w if k == IGNORED else f"{w}={task.labels[k]}" for w, k in zip(words, labels, strict=True)]


def test_the_first_token_of_a_word_carries_its_tag_as_in_transformers_own_way(build: Any) -> None:
    task, rows = build([{"tokens": WORDS, "tags": TAGS, "id": "x"}])
    tokenizer = wordpiece()
    encoded = task.encode(rows, tokenizer)
    reference = tokenizer(WORDS, is_split_into_words=True)
    assert encoded[0]["input_ids"].tolist() == reference["input_ids"]
    seen: set[int | None] = {None}
    expected = [-100 if w in seen or seen.add(w) else task.labels.index(TAGS[w]) for w in reference.word_ids()]
    assert encoded[0]["labels"].tolist() == expected
    assert tagged(task, encoded, tokenizer)[1:4] == ["wal=O", "##king", "##s"]
    assert (encoded.ids, task.labels, task.metric_names[0]) == (["x"], ["B-LOC", "O"], "f1")


@pytest.mark.parametrize("make", [lambda: byte_level(True), lambda: byte_level(False), metaspace])
def test_a_space_counts_to_the_word_behind_it(make: Any, build: Any) -> None:
    """Words stand in a text with spaces between them, whether or not the tokenizer would add one before each."""
    tokenizer = make()
    task, rows = build([{"tokens": ["ta", "so", "to"], "tags": ["A", "B", "C"]}])
    encoded = task.encode(rows, tokenizer)
    found = tagged(task, encoded, tokenizer)
    if tokenizer.unk_token is None:
        assert found == ["t=A", "a", "Ġ=B", "s", "o", "Ġt=C", "o"]
    else:
        assert found == ["▁=A", "t", "a", "▁=B", "s", "o", "▁to=C"]


def test_words_that_make_no_token_keep_their_place(build: Any) -> None:
    tokenizer = wordpiece()
    rows_in = [
        {"tokens": ["\u200b", "to", "", "\ufe0f", "paris", " "], "tags": list("abcdef")},
        {"tokens": ["\u200b"], "tags": ["a"]},
    ]
    task, rows = build(rows_in)
    encoded = task.encode(rows, tokenizer)
    assert tagged(task, encoded, tokenizer) == [
        *("[CLS]", "[UNK]=a", "to=b", "[UNK]=c", "[UNK]=d", "par=e", "##is", "[UNK]=f", "[SEP]")
    ]
    assert tagged(task, encoded, tokenizer, 1) == ["[CLS]", "[UNK]=a", "[SEP]"]
    assert encoded[0]["token_type_ids"].tolist() == [0] * 9
    assert encoded.notes == ["5 words of which the tokenizer makes nothing: read as its unknown token"]
    short, rows = build(rows_in, max_length=6)
    cut = short.encode(rows, tokenizer)
    assert tagged(short, cut, tokenizer) == ["[CLS]", "[UNK]=a", "to=b", "[UNK]=c", "[UNK]=d", "[SEP]"]
    assert cut.truncated == 1 and cut.notes[0].startswith("2 words lost behind data.max_length=6 tokens")


def test_words_behind_the_end_are_lost_and_counted(build: Any) -> None:
    tokenizer = wordpiece()
    task, rows = build([{"tokens": WORDS, "tags": TAGS}, {"tokens": ["to"], "tags": ["O"]}], max_length=4)
    encoded = task.encode(rows, tokenizer)
    assert tagged(task, encoded, tokenizer) == ["[CLS]", "wal=O", "##king", "[SEP]"]
    assert (encoded.truncated, encoded.notes[0].split()[:3]) == (1, ["3", "words", "lost"])
    with pytest.raises(UserError, match="max_length=2 leaves no room"):
        build([{"tokens": WORDS, "tags": TAGS}], max_length=2)[0].encode(rows, tokenizer)


def test_numbers_are_tags_by_the_names_of_the_data_or_of_the_user(build: Any) -> None:
    import datasets

    names = ["O", "B-LOC", "I-LOC"]
    features = {
        "words": datasets.List(datasets.Value("string")),
        "ner_tags": datasets.List(datasets.ClassLabel(names=names)),
    }
    hub = datasets.Dataset.from_dict({"words": [["to", "paris"]], "ner_tags": [[0, 1]]}, datasets.Features(features))
    rows = Rows({"train": hub.add_column(ROW, [0])}, source="hub")
    task = build_task(SimpleNamespace(task="ner", columns={}, labels=None, metrics=[], max_length=9))
    task.fit(rows)
    assert task.labels == names and task.model_kwargs()["id2label"] == dict(enumerate(names))
    assert tagged(task, task.encode(rows.splits["train"], wordpiece()), wordpiece())[1:3] == ["to=O", "par=B-LOC"]

    mine = [{"tokens": ["to", "paris"], "tags": [0, 1]}]
    task, own = build(mine, labels=names)
    assert tagged(task, task.encode(own, wordpiece()), wordpiece())[1:3] == ["to=O", "par=B-LOC"]
    task, _ = build(mine)
    assert (task.labels, task.metric_names) == (["0", "1"], ["accuracy"])
    assert "these tags mark no entities" in task.facts()["scored"]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"tokens": ["to", "paris"], "tags": ["O"]}, {}, "2 entries in 'tokens' and 1 in 'tags'"),
        ({"tokens": "to paris", "tags": ["O", "O"]}, {}, "'tokens' is no list, one entry a word .str"),
        ({"tokens": ["to"], "tags": {"a": 1}}, {}, "'tags' is no list"),
        ({"tokens": [], "tags": []}, {}, "'tokens' is empty"),
        ({"tokens": None, "tags": ["O"]}, {}, "'tokens' is missing"),
        ({"tokens": ["to", 3], "tags": ["O", "O"]}, {}, "word 2 of 'tokens' is no text"),
        ({"tokens": ["to", "to"], "tags": ["O", None]}, {}, "tag 2 of 'tags' is no word or number"),
        (
            {"tokens": ["to"], "tags": ["B-PRE"]},
            {"labels": ["O", "B-PER"]},
            "tag 'B-PRE' is none of the tags .O, B-PER",
        ),
        ({"tokens": ["to"], "tags": [7]}, {"labels": ["O", "B-PER"]}, "tag '7' is none of the tags"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row: Any, options: Any, message: str, build: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build([{"tokens": ["to"], "tags": ["O"]}, row], **options)
    assert str(caught.value.where).endswith("rows.jsonl, line 2")


def test_what_can_be_known_beforehand_is_refused(build: Any) -> None:
    row = {"tokens": ["to"], "tags": ["O"]}
    with pytest.raises(UserError, match="every word has the same tag 'O'"):
        build([row])
    with pytest.raises(UserError, match=r"no column 'pos' for data\.columns\.tags"):
        build([row], columns={"tags": "pos"})
    with pytest.raises(UserError, match=r"unknown key 'data\.columns\.text'"):
        build([row], columns={"text": "tokens"})
    task, rows = build([row], labels=["O", "B-X"])
    with pytest.raises(UserError, match="does not say which word a token comes from"):
        task.encode(rows, SimpleNamespace(is_fast=False))


def test_the_loss_is_the_mean_over_words_whatever_batches_they_come_in(build: Any) -> None:
    from transformers import BertConfig, BertForTokenClassification

    sentences = [["paris", "to"], ["to"], WORDS]
    task, rows = build([{"tokens": s, "tags": ["O", "B-LOC", "O", "I-LOC"][: len(s)]} for s in sentences])
    encoded = task.encode(rows, wordpiece())
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForTokenClassification(BertConfig(vocab_size=len(PIECES), num_labels=3, **shape)).eval()
    batch = encoded.batch([0, 1, 2])
    found = task.loss(model, batch)
    assert int(found.n) == task.count(batch) == 7
    assert found.total.item() / 7 == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    parts = [task.loss(model, encoded.batch(part)) for part in ([0, 1], [2])]
    assert sum(part.total.item() for part in parts) == pytest.approx(found.total.item(), rel=1e-5)
    half = task.loss(model.bfloat16(), batch)
    by_hand = F.cross_entropy(
        half.outputs[batch["labels"] >= 0], batch["labels"][batch["labels"] >= 0], reduction="sum"
    )
    assert half.total.dtype == torch.float32 and half.total.item() == pytest.approx(by_hand.item(), rel=1e-6)
