"""The model card, ``README.md`` beside an adapter or a merged model: what it is and how to load it elsewhere.

Written from what the files of a run say. Paths of this machine stay out of it: a base or data that lies in a folder
is called just that.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "README.md"
PLACEHOLDER = "NAME_OR_FOLDER"  # until it has a name on the hub
NEW_TOKENS = "trainable_token_indices"  # PEFT's setting
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)

# kind of task → what the hub calls it, and transformers' class
TASKS = {
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "regression": ("text-classification", "AutoModelForSequenceClassification"),
    "ner": ("token-classification", "AutoModelForTokenClassification"),
    "multiple_choice": ("multiple-choice", "AutoModelForMultipleChoice"),
    "qa": ("question-answering", "AutoModelForQuestionAnswering"),
    "sft": ("text-generation", "AutoModelForCausalLM"),
    "clm": ("text-generation", "AutoModelForCausalLM"),
    "summarization": ("summarization", "AutoModelForSeq2SeqLM"),
}
SEPARATOR = r"[/\\]"  # of paths
NO_TASK = (None, "AutoModel")


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter; empty where it is not.

    Attributes:
        adapter: ``adapter_config.json``.
        method: ``method.json``.
        summary: ``summary.json`` of its run.
        run: ``config.yaml`` of its run.
        words: the overrides that the run was started with.
        max_lora_rank: what a server of adapters has to be told; null where none takes it.
        repository: the name on the hub.
        others: ``config.yaml`` of the runs whose adapters were combined with it.
    """

    adapter: Mapping[str, Any]
    method: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    words: Sequence[str] = ()
    max_lora_rank: int | None = None
    repository: str | None = None
    others: Sequence[Mapping[str, Any]] = ()

    @property
    def base(self) -> str | None:
        """The base's name on the hub; null where it lies in a folder or a package."""
        return _on_hub(self.adapter.get("base_model_name_or_path"))

    @property
    def base_words(self) -> str:
        asked = (self.run.get("model") or {}).get("name")
        packaged = asked if isinstance(asked, str) and asked.startswith("package://") else None
        name = self.base or packaged
        return f"`{name}`" if name else "a model in a folder of its author"

    @property
    def dataset(self) -> str | None:
        return _dataset(self.run)

    @property
    def datasets(self) -> list[str]:
        """Of all runs, each once."""
        return list(dict.fromkeys(name for run in (self.run, *self.others) if (name := _dataset(run))))

    @property
    def task(self) -> tuple[str | None, str]:
        return TASKS.get((self.run.get("data") or {}).get("task", ""), NO_TASK)

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = self.summary.get("metrics") or self.method.get("metrics") or {}
        return found

    @property
    def title(self) -> str:
        if self.repository:
            return self.repository.rpartition("/")[2]
        recipe, method = (self.method.get(key) or self.summary.get(key) for key in ("recipe", "method"))
        return f"{Path(recipe).stem}, {method}" if recipe and method else "model"


def adapter_card(facts: Facts, done: str = "") -> str:
    """The card of an adapter.

    Args:
        done: a sentence on what was done to it after its training.
    """
    trained = f" with the method `{facts.method['method']}`" if facts.method.get("method") else ""
    lines = [f"# {facts.title}", "", f"An adapter of {facts.base_words}, trained{trained} by dora_cli.", ""]
    lines += [done, ""] if done else []
    lines += [*_budget(facts.summary), *_ranks(facts.method.get("ranks") or {}), *_metrics(facts.metrics)]
    lines += [*_loading(facts), *_repeat(facts)]
    return _header(facts, "peft", "adapter") + "\n".join(lines)


def merged_card(facts: Facts, made_of: Sequence[str] = ()) -> str:
    """The card of a model that one adapter, or several, were merged into.

    Args:
        made_of: a line for each way in which several were combined.
    """
    what = "Several adapters" if made_of else "An adapter"
    lines = [f"# {facts.title}", "", f"{what} merged by dora_cli into the weights of {facts.base_words}.", ""]
    lines += [*(f"- {line}" for line in made_of), *([""] if made_of else [])]
    lines += [*_budget(facts.summary), *_metrics(facts.metrics)]
    name, loader = facts.repository or PLACEHOLDER, facts.task[1]
    load = f'model = {loader}.from_pretrained("{name}")'
    lines += ["## Use", "", *_python(f"from transformers import {loader}", "", load), *_repeat(facts)]
    return _header(facts, "transformers", "finetune") + "\n".join(lines)


def _header(facts: Facts, library: str, relation: str) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    kind = facts.task[0]
    results = [
        EvalResult(
            task_type=kind or "other",
            dataset_type=facts.dataset or "own",
            dataset_name=facts.dataset or "own data",
            dataset_config=(facts.run.get("data") or {}).get("config"),
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for split, values in facts.metrics.items()
        for name, value in _shown(values)
    ]
    method = facts.method.get("method")
    data = ModelCardData(
        base_model=facts.base,
        base_model_relation=relation if facts.base else None,
        datasets=facts.datasets or None,
        library_name=library,
        pipeline_tag=kind,
        tags=["dora_cli", "lora", *([str(method)] if method else [])],
        model_name=facts.title,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _budget(summary: Mapping[str, Any]) -> list[str]:
    budget = summary.get("budget")
    if not budget or not budget.get("params_end"):
        return []
    asked = budget["requested"] if budget["requested"] is not None else "none"
    rows = [
        (unit, f"{budget[f'{key}_start']:,}", f"{budget[f'{key}_end']:,}")
        for unit, key in ((summary["unit"], "components"), ("parameters", "params"))
    ]
    lines = ["## Budget", "", f"Asked for: `{asked}`.", "", *_table(("", "at the start", "alive at the end"), rows), ""]
    if summary.get("head_params"):
        lines += [f"Beside it, {summary['head_params']:,} parameters were trained in full and are not counted.", ""]
    return lines


def _ranks(ranks: Mapping[str, int]) -> list[str]:
    """How the rank lies by type of module: its name below the layer's number."""
    by_type: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        by_type.setdefault(re.sub(r"^.*\.\d+\.", "", name), []).append(rank)
    if not by_type:
        return []
    rows = [
        (f"`{kind}`", str(len(values)), str(min(values)), f"{sum(values) / len(values):.1f}", str(max(values)))
        for kind, values in by_type.items()
    ]
    return ["## Rank by type of module", "", *_table(("module", "layers", "lowest", "mean", "highest"), rows), ""]


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [(split, name, f"{value:.4g}") for split, values in metrics.items() for name, value in _shown(values)]
    return ["## Metrics", "", *_table(("split", "metric", "value"), rows), ""] if rows else []


def _shown(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(name, v) for name, v in values.items() if isinstance(v, (int, float)) and abs(v) < float("inf")]


def _loading(facts: Facts) -> list[str]:
    """How to load it, where more than dora_cli can."""
    name, base, loader = facts.repository or PLACEHOLDER, facts.base or "BASE", facts.task[1]
    if facts.adapter.get("peft_type") != "LORA":
        text = f"`dora-merge checkpoint=FOLDER base={base} out=MERGED` makes a transformers model of it."
        return ["## Use", "", text, ""]
    names = (facts.method.get("model_config") or {}).get("id2label")
    labels = f", num_labels={len(names)}" if names and loader.endswith("Classification") else ""
    load = [f'model = {loader}.from_pretrained("{base}"{labels})']
    classes = loader
    if facts.adapter.get(NEW_TOKENS):
        classes = f"{loader}, AutoTokenizer"
        load += [
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            "if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # room for its new tokens",
            "    model.resize_token_embeddings(len(tokenizer))",
        ]
    begin = [f"from transformers import {classes}", "", *load]
    lines = ["## Use", "", "In PEFT:", ""]
    lines += _python("from peft import PeftModel", *begin, f'model = PeftModel.from_pretrained(model, "{name}")')
    lines += ["In transformers, with PEFT installed:", "", *_python(*begin, f'model.load_adapter("{name}")')]
    if facts.max_lora_rank and facts.task[0] == "text-generation":
        serve = f"vllm serve {base} --enable-lora --max-lora-rank {facts.max_lora_rank} --lora-modules mine={name}"
        lines += ["In vLLM:", "", "```bash", serve, "```", ""]
    return lines


def _repeat(facts: Facts) -> list[str]:
    lines: list[str] = []
    if facts.words:
        words = (_without_paths(word, facts.base) for word in facts.words)
        lines += ["## Repeat it", "", "```bash", f"dora-train {' '.join(words)}", "```", ""]
    if versions := facts.summary.get("versions"):
        told = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "machine")
        lines += [f"Made with {told}.", ""]
    return lines


def _without_paths(word: str, base: str | None) -> str:
    """A word of the command for the eyes of others: what lies in folders here is left to the reader.

    Args:
        base: the base's name on the hub; null where the run had it from a folder, whatever it was called.
    """
    word = word.lstrip("+")  # Hydra's, which change nothing here
    key, _, value = word.partition("=")
    if key == "recipe":
        return shlex.quote(f"recipe={re.split(SEPARATOR, value)[-1]}")
    if value.startswith("package://"):
        here = False
    elif key == "model.name":
        here = value != base
    else:
        path = re.search(SEPARATOR, value) or value.startswith("~") or key == "--config-dir"
        here = bool(path) and not (key == "data.name" and _on_hub(value))
    return f"{key}=…" if here else shlex.quote(word)


def _dataset(run: Mapping[str, Any]) -> str | None:
    """The name on the hub of what a run was trained on."""
    data = run.get("data") or {}
    return None if data.get("path") else _on_hub(data.get("name"))


def _on_hub(name: Any) -> str | None:
    """A name that may be one on the hub, and is no folder here."""
    if not isinstance(name, str) or not HUB_NAME.fullmatch(name) or name.startswith(".") or Path(name).exists():
        return None
    return name


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]
