"""EleutherAI's harness on our models: its numbers are those of log-likelihoods taken by hand. Needs the extra."""

import importlib.util
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_cli.cli import train
from dora_cli.cli.eval import main as dora_eval

WORDS = ["red", "green", "blue", "one", "two", "three", "say", "again"]
installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an optional extra")
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SURPRISE = """
task: tiny_surprise
output_type: loglikelihood
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks over the same 30 questions, each with three answers of one to three words."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(30):
            choices = [" " + " ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(3)]
            question = " ".join(draw.choices(WORDS, k=draw.randint(2, 6)))
            file.write(json.dumps({"question": question, "choices": choices, "gold": draw.randrange(3)}) + "\n")
    for name, text in (("choice", CHOICE), ("surprise", SURPRISE)):
        (folder / f"{name}.yaml").write_text(text + COMMON.format(folder=folder))
    return folder


def by_hand(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Accuracy of the likeliest answer, and e to the mean surprise of the first one: one at a time, no padding."""

    def log_likelihood(question: str, answer: str) -> float:
        before, whole = (tokenizer(text)["input_ids"] for text in (question, question + answer))
        log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(float(log_p[i - 1, whole[i]]) for i in range(len(before), len(whole)))

    with torch.no_grad():
        said = [[log_likelihood(row["question"], choice) for choice in row["choices"]] for row in rows]
    right = sum(likely.index(max(likely)) == row["gold"] for likely, row in zip(said, rows, strict=True))
    return right / len(rows), math.exp(-sum(likely[0] for likely in said) / len(rows))


@installed
def test_its_numbers_are_those_of_log_likelihoods_by_hand(
    save_decoder: Callable[..., Path], tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a run with its adapter, on the merged folder, and on the first rows with the bare base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_decoder(tmp_path / "base", WORDS, None)
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    with (tmp_path / "texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": row["question"] + row["choices"][row["gold"]]}) + "\n" for row in rows)
    words = [f"model.name={base}", f"data.path={tmp_path}/texts.jsonl", "budget=r2", "train.learning_rate=0.05"]
    assert (
        train.main(
            [
                "recipe=clm_text",
                *words,
                "train.epochs=4",
                "train.eval_every=16",
                "save.merged=true",
                f"out={tmp_path}/run",
            ]
        )
        == 0
    )

    tokenizer = AutoTokenizer.from_pretrained(base)
    bare = AutoModelForCausalLM.from_pretrained(base).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged").eval()
    before, (first_ten, _) = by_hand(bare, tokenizer, rows), by_hand(bare, tokenizer, rows[:10])
    models = {tmp_path / "run/merged": by_hand(merged, tokenizer, rows)}
    adapted = PeftModel.from_pretrained(bare, tmp_path / "run/adapter").eval()
    models[tmp_path / "run"] = by_hand(adapted, tokenizer, rows)
    assert abs(before[1] - models[tmp_path / "run"][1]) > 0.1, "training has changed something"

    own = ["harness=[tiny_choice,tiny_surprise]", f"harness.include_path={tasks}"]
    for checkpoint, (accuracy, perplexity) in models.items():
        assert dora_eval([f"checkpoint={checkpoint}", *own, f"out={tmp_path}/out"]) == 0
        record = json.loads((tmp_path / "out/eval-harness.json").read_text())
        assert record["results"]["tiny_choice"]["acc,none"] == pytest.approx(accuracy)
        assert record["results"]["tiny_surprise"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
        assert record["n-samples"]["tiny_choice"]["effective"] == 30
    said = capsys.readouterr().out
    assert "tiny_choice" in said and "bootstrapping" not in said

    assert dora_eval([f"checkpoint={base}", *own, "harness.limit=10", f"out={tmp_path}/out"]) == 0
    record = json.loads((tmp_path / "out/eval-harness.json").read_text())
    assert record["results"]["tiny_choice"]["acc,none"] == pytest.approx(first_ten)
    assert dora_eval([f"checkpoint={base}", *own, "harness.chat_template=true", f"out={tmp_path}/none"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_without_the_extra_it_says_how_to_get_it(
    save_decoder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dora_cli.evaluation import harness

    base = save_decoder(tmp_path / "base", WORDS, None)
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert dora_eval([f"checkpoint={base}", "harness=hellaswag"]) == 2
    assert "pip install 'dora-cli[harness]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["harness.limit=5"], "harness.limit has no meaning without harness"),
        (["harness=a", "harness.limit=0"], "harness.limit=0 is no whole number of 1 or more"),
        (["harness=[a,,b]"], "is no list of tasks"),
        (["harness=a", "harness.chat_template=yes"], "is neither true nor false"),
        (["harness=a", "recipe=quickstart"], "harness= is for language models, and this is data.task=classification"),
        (["harness=a", "harness.limits=3"], "did you mean 'harness.limit'"),
    ],
)
def test_mistakes_are_answered(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_eval([f"checkpoint={tmp_path}", *words]) == 2
    assert message in capsys.readouterr().err


@installed
def test_an_unknown_task_is_answered_with_its_neighbours(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    from dora_cli.errors import UserError
    from dora_cli.evaluation.harness import HarnessChoice, load_tasks

    def few(self: Any, include_path: str | None = None, include_defaults: bool = True) -> None:
        real(self, include_path=include_path, include_defaults=False)  # the harness's own 14,000 take 20 seconds

    real = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", few)
    with pytest.raises(UserError) as caught:
        load_tasks(HarnessChoice(["tiny_choise"], include_path=tasks), offline=True)
    assert "'tiny_choice'" in caught.value.hint
    found = load_tasks(HarnessChoice(["tiny_*"], include_path=tasks), offline=True)
    assert set(found["tasks"]) == {"tiny_choice", "tiny_surprise"}
    (tasks / "broken.yaml").write_text("task: tiny_broken\noutput_type: multiple_choice\ndataset_path: json\n")
    with pytest.raises(UserError, match="can't be loaded"):
        load_tasks(HarnessChoice(["tiny_broken"], include_path=tasks), offline=True)
