"""Tags for words and choices for questions: trained by the command, pruned, merged, read by PEFT, evaluated."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge

STEPS = ["train.max_steps=30", "train.eval_every=30", "train.log_every=30", "train.learning_rate=0.05"]
METHOD = ["method=dora", "budget=r2", "adapter.rank=4", "schedule.start=4", "schedule.end=16", "allocator.interval=4"]


def write(folder: Path, row: Callable[[], dict[str, Any]]) -> Path:
    folder.mkdir()
    for split, n in (("train", 48), ("validation", 16)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(n)))
    return folder


@pytest.fixture
def tagged(tiny: Any, tmp_path: Path) -> Path:
    """A good word begins an entity, a bad one goes on with it."""
    draw = random.Random(0)
    tags = {w: "O" for w in tiny.FILLER} | {w: "B-X" for w in tiny.GOOD} | {w: "I-X" for w in tiny.BAD}

    def row() -> dict[str, Any]:
        words = draw.choices(list(tags), k=draw.randint(2, 9))
        return {"tokens": words, "tags": [tags[word] for word in words]}

    return write(tmp_path / "tagged", row)


@pytest.fixture
def questions(tiny: Any, tmp_path: Path) -> Path:
    """The good word is right, among two to four."""
    draw = random.Random(0)

    def row() -> dict[str, Any]:
        choices = [draw.choice(tiny.GOOD), *draw.choices(tiny.BAD, k=draw.randint(1, 3))]
        right = choices[0]
        draw.shuffle(choices)
        return {"text": " ".join(draw.choices(tiny.FILLER, k=3)), "choices": choices, "label": choices.index(right)}

    return write(tmp_path / "questions", row)


@pytest.mark.parametrize(
    ("recipe", "auto_class", "task_type"),
    [
        ("ner", "AutoModelForTokenClassification", "TOKEN_CLS"),
        ("multiple_choice", "AutoModelForMultipleChoice", None),
    ],
)
def test_it_learns_and_adapted_merged_and_pefts_logits_agree(
    recipe: str,
    auto_class: str,
    task_type: str | None,
    dora_train: Callable[..., int],
    model_dir: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    import transformers
    from peft import PeftModel

    data = request.getfixturevalue({"ner": "tagged", "multiple_choice": "questions"}[recipe])
    run = tmp_path / "run"
    assert dora_train(f"recipe={recipe}", f"data.path={data}", *METHOD, *STEPS) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert sum(summary["ranks"].values()) == 24  # two for each of twelve modules
    assert summary["train"]["samples"] == 30 * 8, "a question is one, whatever its choices"
    metrics = summary["metrics"]["validation"]
    assert metrics["accuracy"] > {"ner": 0.6, "multiple_choice": 0.75}[recipe]  # by chance 0.5 and 0.35
    assert json.loads((run / "adapter/adapter_config.json").read_text())["task_type"] == task_type

    assert dora_merge([f"checkpoint={run}", f"out={tmp_path}/merged"]) == 0
    auto = getattr(transformers, auto_class)
    tokens = torch.randint(4, 24, (3, 9) if recipe == "ner" else (3, 4, 9), generator=torch.Generator().manual_seed(0))
    labels = {"num_labels": 3} if recipe == "ner" else {}
    base = auto.from_pretrained(model_dir, **labels).eval()
    peft = PeftModel.from_pretrained(base, run / "adapter").eval()
    merged, report = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(peft(tokens).logits, merged.eval()(tokens).logits, atol=1e-5, rtol=0)
    if recipe == "ner":
        assert merged.config.id2label == {0: "B-X", 1: "I-X", 2: "O"}

    assert dora_eval([f"checkpoint={run}", f"out={tmp_path}/one"]) == 0
    assert dora_eval([f"checkpoint={tmp_path}/merged", f"recipe={run}/config.yaml", f"out={tmp_path}/two"]) == 0
    one, two = (json.loads((tmp_path / n / "eval-validation.json").read_text())["metrics"] for n in ("one", "two"))
    assert one == pytest.approx(metrics, abs=1e-5) and two == pytest.approx(metrics, abs=1e-5)
    said = [json.loads(line) for line in (tmp_path / "one/predictions-validation.jsonl").read_text().splitlines()]
    meant = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in said] == [row["tags" if recipe == "ner" else "label"] for row in meant]


def test_a_split_of_its_own_is_tagged_by_the_heads_tags(
    dora_train: Callable[..., int], tagged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which tags an evaluated file has says nothing of their order."""
    assert dora_train("recipe=ner", f"data.path={tagged}", "method=lora", "budget=r1", "train.max_steps=2") == 0
    (tmp_path / "own.jsonl").write_text('{"tokens": ["film", "good"], "tags": ["O", "B-X"]}\n')
    assert dora_eval([f"checkpoint={tmp_path}/run", f"data.path={tmp_path}/own.jsonl", f"out={tmp_path}/own"]) == 0
    row = json.loads((tmp_path / "own/predictions-validation.jsonl").read_text())
    assert row["reference"] == ["O", "B-X"] and len(row["prediction"]) == 2
    words = [f"checkpoint={tmp_path}/run", f"data.path={tmp_path}/own.jsonl", "data.labels=[O,B-X,I-X]"]
    assert dora_eval(words) == 2, "numbers would be counted in another order than the user says"
    assert "not the labels of the head that was trained" in capsys.readouterr().err
    (tmp_path / "own.jsonl").write_text('{"tokens": ["good"], "tags": ["B-Y"]}\n')
    assert dora_eval([f"checkpoint={tmp_path}/run", f"data.path={tmp_path}/own.jsonl", f"out={tmp_path}/own"]) == 2
    assert "tag 'B-Y' is none of the tags (B-X, I-X, O)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "shown"),
    [
        ("ner", r"\d+ tokens, \d+ learned \(in brackets\)\s+\[CLS\] \[\w+ (O|B-X|I-X)\]"),
        ("multiple_choice", r"labels \d; choices \d *\n +\[CLS\] \w+ \w+ \w+ \[SEP\] \w+ \[SEP\] *\n +\[CLS\]"),
    ],
)
def test_the_dry_run_shows_words_with_tags_and_a_line_a_choice(
    recipe: str,
    shown: str,
    dora_train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dora_cli.training.plan._memory", lambda session: ({}, {}))  # takes seconds
    data = request.getfixturevalue({"ner": "tagged", "multiple_choice": "questions"}[recipe])
    assert dora_train(f"recipe={recipe}", f"data.path={data}", "method=lora", "budget=r1", "dry_run=true") == 0
    examples = capsys.readouterr().out.partition("examples")[2]
    assert re.search(shown, examples), examples
    assert not (tmp_path / "run").exists()
