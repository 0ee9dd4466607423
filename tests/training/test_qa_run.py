"""A small encoder that learns to find answers: pruned, merged, read by PEFT, evaluated by rows."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge
from dora_cli.cli.train import main as dora_train

FILLER = ["it", "was", "said", "that", "all", "went", "home", "and", "slept"]
THINGS = ["cup", "hat", "pen", "key"]
COLOURS = ["red", "green", "blue", "grey"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", *FILLER, *THINGS, *COLOURS]
    rust = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=rust, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,  # frozen words must differ, or nothing can be found
        hidden_dropout_prob=0.0,
        id2label={"0": "one", "1": "two", "2": "three"},  # of another task before
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Is anything of a colour there? The answer is the colour's word and the thing behind it."""
    folder, draw = tmp_path_factory.mktemp("questions"), random.Random(0)
    for split, n in (("train", 160), ("validation", 24)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(n):
                words = draw.choices(FILLER, k=draw.randint(4, 24))
                answer = f"{draw.choice(COLOURS)} {draw.choice(THINGS)}"
                at = draw.randrange(len(words))
                context = " ".join([*words[:at], answer, *words[at:]] if i % 4 else words)
                answers = {"text": [answer], "answer_start": [context.index(answer)]} if i % 4 else {}
                row = {"id": f"{split}-{i}", "question": "it was ?", "context": context}
                file.write(json.dumps({**row, "answers": answers or {"text": [], "answer_start": []}}) + "\n")
    return folder


@pytest.fixture
def tune(encoder: Path, questions: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*words: str) -> int:
        common = ["recipe=squad_v2", f"model.name={encoder}", f"data.path={questions}", "data.max_length=16"]
        common += ["data.doc_stride=4", "data.max_answer_length=4", "train.learning_rate=0.01", f"out={tmp_path}/run"]
        return dora_train(
            [
                *common,
                "method=dora",
                "budget=r2",
                "adapter.rank=4",
                "adapter.dropout=0",
                "allocator.interval=10",
                *words,
            ]
        )

    return run


def test_it_learns_and_evaluations_agree_by_rows(
    tune: Callable[..., int], encoder: Path, questions: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForQuestionAnswering

    assert tune("train.max_steps=90", "train.eval_every=90", "train.epochs=1") == 0
    run = tmp_path / "run"
    validation = json.loads((run / "summary.json").read_text())["metrics"]["validation"]
    assert list(validation) == ["loss", "f1", "exact", "HasAns_f1", "HasAns_exact", "NoAns_f1"]
    assert validation["f1"] > 0.5 and validation["HasAns_exact"] > 0.2

    assert dora_merge([f"checkpoint={run}", f"out={tmp_path}/merged"]) == 0
    base = AutoModelForQuestionAnswering.from_pretrained(encoder, num_labels=2)
    tokens = torch.randint(4, 20, (3, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "token_type_ids": (torch.arange(12) > 4).long().expand(3, 12)}
    through_peft = PeftModel.from_pretrained(base, run / "adapter").eval()(**inputs)
    merged = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()(**inputs)
    assert torch.allclose(through_peft.start_logits, merged.start_logits, atol=1e-5)
    assert torch.allclose(through_peft.end_logits, merged.end_logits, atol=1e-5)

    assert dora_eval([f"checkpoint={run}", f"out={tmp_path}/one", "train.eval_batch_size=5"]) == 0
    assert dora_eval([f"checkpoint={tmp_path}/merged", f"recipe={run}/config.yaml", f"out={tmp_path}/two"]) == 0
    one, two = (json.loads((tmp_path / name / "eval-validation.json").read_text()) for name in ("one", "two"))
    assert one["rows"] == two["rows"] == 24
    assert one["metrics"] == pytest.approx(validation, abs=1e-5) == two["metrics"]
    said = [json.loads(line) for line in (tmp_path / "one/predictions-validation.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (questions / "validation.jsonl").read_text().splitlines()]
    assert [s["id"] for s in said] == [r["id"] for r in rows]
    assert [s["reference"] for s in said] == [r["answers"]["text"] for r in rows]
    assert sum(s["f1"] for s in said) / 24 == pytest.approx(validation["f1"])
    assert all(s["prediction"] in ("", r["context"][slice(*s["span"])]) for s, r in zip(said, rows, strict=True))


def test_the_dry_run_counts_rows_and_windows_and_shows_answers(
    tune: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("dry_run=true") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "160 rows in" in said and "40 of train, 6 of validation" in said
    assert "no answer in it: what stands for none in brackets [[CLS]] it was ? [SEP]" in said
    assert any(f"[{colour} {thing}]" in said for colour in COLOURS for thing in THINGS)


def test_keys_of_questions_are_refused_elsewhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["recipe=text_classification", f"out={tmp_path}/run", f"data.path={tmp_path}", "data.doc_stride=4"]
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "b"}\n' * 4)
    assert dora_train(words) == 2
    assert "data.doc_stride is read by data.task=qa, not by classification" in capsys.readouterr().err
