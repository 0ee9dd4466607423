"""One evaluation: find what the checkpoint is, load it, measure it, write the two files."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

from dora_cli.checkpoints.adapter_file import AdapterFile, read_adapter
from dora_cli.checkpoints.adapter_format import METHOD
from dora_cli.checkpoints.apply import apply_adapter
from dora_cli.checkpoints.atomic import atomic_write_text
from dora_cli.checkpoints.json_io import read_json, strings
from dora_cli.checkpoints.manifest import verify_if_listed
from dora_cli.cli import run_folder
from dora_cli.cli.harness_run import evaluate_through_harness, read_choice
from dora_cli.cli.parts import load_parts
from dora_cli.config.compose import compose
from dora_cli.config.schema import Config, DataConfig
from dora_cli.data.sources import buffer_size, load_rows
from dora_cli.data.tasks import build_task
from dora_cli.errors import UserError
from dora_cli.evaluation.predict import evaluate
from dora_cli.models.load import load_model
from dora_cli.models.quantised import KINDS
from dora_cli.reporting.events import jsonable
from dora_cli.reporting.terminal import counting
from dora_cli.training.setup import autocast_dtype, lower, pick_device

NAMED = ("classification", "ner")  # tasks whose labels the head has in its order
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def evaluate_checkpoint(own: Mapping[str, str], overrides: Sequence[str], config_dirs: Sequence[str]) -> int:
    """Evaluate ``own["checkpoint"]`` on ``own["split"]``; prints the metrics and where the files are.

    Raises:
        UserError: no such checkpoint, nothing that says which data, or anything that does not fit.
    """
    folder = Path(expanduser(own["checkpoint"]))
    if not folder.exists() and (not own.keys() & {"recipe", "harness"} or not HUB_NAME.fullmatch(own["checkpoint"])):
        raise UserError(
            f"checkpoint={own['checkpoint']}: no such folder",
            where=f"looked for {folder.absolute()}",
            hint="name a run, an adapter or a model folder; one of the hub (OWNER/NAME) needs recipe= or harness= too",
        )
    if folder.is_dir():
        verify_if_listed(folder)
    adapter = _adapter(folder)
    harness = read_choice(own) if "harness" in own else None
    config = compose(_recipe(own, folder, overrides), load_parts(), config_dirs).config
    quantization = _quantization(adapter, config, overrides)
    if harness is not None:
        task = build_task(config.data)
        if task.auto_class != "AutoModelForCausalLM":
            raise UserError(f"harness= is for language models, and this is data.task={config.data.task}")
        at_any_length = replace(config, data=replace(config.data, max_length=1))
        return evaluate_through_harness(
            harness,
            lambda: _load(own, folder, adapter, at_any_length, task, quantization),
            config,
            own["checkpoint"],
            _out(own, folder),
        )
    split = own.get("split", "validation")

    labels = _labels(adapter, folder)
    data = config.data
    if labels and data.task in NAMED:
        if data.labels is not None and [str(label) for label in data.labels] != labels:
            raise UserError(
                f"data.labels=[{', '.join(map(str, data.labels))}] are not the labels of the head that was trained",
                where=f"of {folder}, in their order: {', '.join(labels)}",
                hint="set data.labels=null; numbers in the data are then labels in that order, and texts their names",
            )
        data = replace(data, labels=labels)
    role = _file_role(overrides, split)
    # Without a validation split some of train was held out; what is left is the train split that was trained on.
    roles = ["train", "validation"] if split == "train" and role == "train" else [split]
    buffer = buffer_size(data) if role == "train" else None
    if buffer and split == "train" and _names_data(overrides):  # what is named here is read as a whole
        roles, buffer = [split], None
    rows = load_rows(data, offline=config.offline, seed=config.seed, roles=roles, file_role=role, stream=buffer)
    if rows.stream is not None:
        raise UserError("split=train was streamed, not read as a whole", hint="give data.path=FILE to evaluate a file")
    task = build_task(data)
    task.fit(rows)
    model, tokenizer = _load(own, folder, adapter, config, task, quantization)
    device = pick_device(config.train.device)
    encoded = task.encode(rows.splits[split], tokenizer)
    with counting(f"{split}, rows", len(encoded)) as advance:
        result = evaluate(
            model.to(device),
            task,
            encoded,
            device=device,
            batch_size=config.train.eval_batch_size,
            autocast_dtype=autocast_dtype(config.train.precision),
            keep_predictions=True,
            advance=advance,
        )
    if encoded.truncated:
        print(f"{split}: {encoded.truncated:,} rows were longer than data.max_length={data.max_length} tokens")
    for note in encoded.notes:
        print(f"{split}: {note}")
    _write(own, folder, split, result.metrics, result.predictions or [], data)
    return 0


def _adapter(folder: Path) -> AdapterFile | None:
    """The adapter in a run or adapter folder; None where the checkpoint is a model."""
    if (folder / run_folder.ADAPTER).is_dir() or (folder / "adapter_config.json").exists():
        return read_adapter(folder)
    if (folder / run_folder.CONFIG).exists():
        raise UserError(
            f"checkpoint={folder} is a run without a result yet",
            hint="finish it with dora-train resume=true, or evaluate another checkpoint",
        )
    return None


def _recipe(own: Mapping[str, str], folder: Path, overrides: Sequence[str]) -> list[str]:
    """Overrides for ``compose``: the recipe asked for, else the configuration of the run the checkpoint belongs to."""
    if "recipe" in own:
        return [f"recipe={own['recipe']}", *overrides]
    for candidate in (folder, folder.absolute().parent):
        if (candidate / run_folder.CONFIG).exists():
            return [f"recipe={candidate / run_folder.CONFIG}", *overrides]
    if "harness" in own:  # whose tasks bring their own data: any recipe for a language model will do
        return ["recipe=clm_text", "data.name=harness", *overrides]
    raise UserError(
        f"checkpoint={folder} does not say which task and data it is for",
        hint="say so with recipe=NAME (and data.path=FILE_OR_FOLDER)",
    )


def _quantization(adapter: AdapterFile | None, config: Config, overrides: Sequence[str]) -> str | None:
    """How the base is packed: as asked for here, else as the adapter was trained; a merged model is not."""
    if any(word.startswith("model.quantization=") for word in overrides):
        return config.model.quantization
    kind = adapter.quantization if adapter is not None else None
    return kind if kind in KINDS else None


def _labels(adapter: AdapterFile | None, folder: Path) -> list[str] | None:
    """The labels in the order of the trained head, so that a number means the same as in training."""
    if adapter is not None:
        names = adapter.method.get("model_config", {}).get("id2label")
    else:
        file = folder / "config.json"
        names = read_json(file).get("id2label") if file.exists() else None
    if not isinstance(names, dict) or not all(str(key).isdecimal() for key in names):
        return None
    ordered = [str(names[key]) for key in sorted(names, key=int)]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(ordered)) or len(ordered) < 2 else ordered


def _file_role(overrides: Sequence[str], split: str) -> str:
    """A single file named here is the split itself; one of the run's own configuration was its training file."""
    return split if _names_data(overrides) else "train"


def _names_data(overrides: Sequence[str]) -> bool:
    return any(word.startswith("data.path=") for word in overrides)


def _load(
    own: Mapping[str, str],
    folder: Path,
    adapter: AdapterFile | None,
    config: Config,
    task: Any,
    quantization: str | None,
) -> tuple[Any, Any]:
    words: list[str] = []  # a model has its tokens in its folder
    if adapter is None:
        name, revision = own["checkpoint"], None
    else:
        words = strings(adapter.method, "added_tokens", adapter.folder / METHOD) or config.model.add_tokens
        name, revision = own.get("base") or adapter.base_name or config.model.name, adapter.revision
    if Path(name).is_dir():
        verify_if_listed(name)
    dtype = autocast_dtype(config.train.precision)
    revision = None if "base" in own else revision
    loaded = load_model(
        replace(config.model, name=name, revision=revision, add_tokens=words, quantization=quantization),
        auto_class=task.auto_class,
        offline=config.offline,
        max_length=config.data.max_length,
        max_target_length=config.data.max_target_length,
        as_stored=dtype is not None,
        device=pick_device(config.train.device),
        **task.model_kwargs(),
    )
    if dtype is not None:  # as in training: what was trained in full is in float32, all else in the type of the pass
        full = {*adapter.head, *adapter.replaced} if adapter is not None else set()
        heads = tuple(f"{module}." for module in loaded.head_modules)
        for name, parameter in loaded.model.named_parameters():
            parameter.requires_grad_(name in full or name.startswith(heads))
        lower(loaded.model, dtype)
    if adapter is None and loaded.missing:
        raise UserError(
            f"checkpoint={folder} has no trained head for this task: {', '.join(loaded.missing[:3])}",
            hint="evaluate a run, an adapter, or a folder that dora-merge wrote",
        )
    if adapter is not None:
        apply_adapter(loaded.model, adapter)
        absent = set(loaded.missing) - set(adapter.head) - set(adapter.replaced)
        if absent:
            raise UserError(
                f"neither the base nor the adapter has {', '.join(sorted(absent)[:3])}",
                where=f"base {name}, adapter {adapter.folder}",
                hint="give the base that the adapter was trained on, with base=",
            )
    return loaded.model, loaded.tokenizer


def _out(own: Mapping[str, str], folder: Path) -> Path:
    return Path(expanduser(own["out"])) if "out" in own else folder if folder.is_dir() else Path("eval") / folder.name


def _write(
    own: Mapping[str, str],
    folder: Path,
    split: str,
    metrics: dict[str, float],
    predictions: list[Any],
    data: DataConfig,
) -> None:
    out = _out(own, folder)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "checkpoint": own["checkpoint"],
        "split": split,
        "data": data.path or data.name,
        "rows": len(predictions),
        "metrics": metrics,
    }
    replaced = (out / f"eval-{split}.json").exists()
    atomic_write_text(out / f"eval-{split}.json", json.dumps(jsonable(record), indent=2) + "\n")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    atomic_write_text(out / f"predictions-{split}.jsonl", lines)
    print(f"{split}: {len(predictions):,} rows  " + "  ".join(f"{name} {value:.6g}" for name, value in metrics.items()))
    print(f"  {out / f'eval-{split}.json'}{' (replaces an earlier one)' if replaced else ''}")
    print(f"  {out / f'predictions-{split}.jsonl'}")
