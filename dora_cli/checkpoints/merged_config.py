"""What ``config.json`` of a merged model says: the base's, with the task it was trained for."""

import re
from collections.abc import Mapping
from typing import Any

from dora_cli.checkpoints.adapter_file import AdapterFile
from dora_cli.checkpoints.base_folder import Base
from dora_cli.errors import UserError

LABEL_KEYS = ("id2label", "label2id", "num_labels", "problem_type")  # a task has all of its own, or the defaults
TOKEN_KEYS = ("pad_token_id", "vocab_size")
# numbers that say which family and size a model is
FAMILY_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_embd", "n_layer", "d_model")
CLASSES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification",
           "QUESTION_ANS": "ForQuestionAnswering"}  # fmt: skip
TASK_ENDINGS = (*CLASSES.values(), "ForMultipleChoice")
HEAD_WEIGHTS = ("classifier.weight", "score.weight", "out_proj.weight")
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def architecture(adapter: AdapterFile, base: Base) -> str | None:
    """The class of the merged model: as our own runs note it, else the base's with the head that PEFT's task names."""
    noted = adapter.method.get("architecture")
    if isinstance(noted, str):
        return noted
    saved = base_architecture(base)
    ending = CLASSES.get(adapter.task_type or "")
    if not saved or not ending:
        return saved
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|Model)$", "", saved) + ending


def base_architecture(base: Base) -> str | None:
    names = base.config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def has_task_head(name: str | None) -> bool:
    """Whether a class puts a small head on its body, in the place of the one for its pretraining."""
    return bool(name) and name.endswith(TASK_ENDINGS)  # type: ignore[union-attr]


def require_family(adapter: AdapterFile, base: Base) -> None:
    """Refuse a base of another kind or size than the one the adapter was trained on, as far as that was noted.

    Raises:
        UserError: naming the first number that differs.
    """
    trained = adapter.method.get("model_config")
    if not isinstance(trained, dict):
        return
    for key in FAMILY_KEYS:
        if key in trained and key in base.config and trained[key] != base.config[key]:
            raise UserError(
                f"the adapter does not fit the base {base.folder}",
                where=f"it was trained on a model with {key} {trained[key]}, the base has {base.config[key]}",
                hint="name the model it was trained on with base=",
            )


def merged_config(
    adapter: AdapterFile, base: Base, dtype: str | None, head_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The merged model's configuration.

    Args:
        dtype: the file's name of the weights' type (``BF16``).
        head_shapes: parameter name → shape of what was trained in full; counts the labels where nothing else says.
    """
    config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
    name = architecture(adapter, base)
    config["architectures"] = [name] if name else config.get("architectures")
    trained = adapter.method.get("model_config")
    if isinstance(trained, dict):
        config = {key: value for key, value in config.items() if key not in LABEL_KEYS}
        config |= {key: trained[key] for key in (*LABEL_KEYS, *TOKEN_KEYS) if key in trained}
    elif adapter.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        _count_labels(config, head_shapes)
    for key in ("dtype", "torch_dtype"):  # its name since transformers 4.56, and before
        if dtype and (key in config or key == "dtype"):
            config[key] = DTYPE_NAMES[dtype]
    return config


def _count_labels(config: dict[str, Any], head_shapes: Mapping[str, tuple[int, ...]]) -> None:
    rows = [shape[0] for name, shape in head_shapes.items() if name.endswith(HEAD_WEIGHTS) and len(shape) == 2]
    known = config.get("id2label")
    if rows and not (isinstance(known, dict) and len(known) == rows[-1]):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(rows[-1])}
        config["label2id"] = {f"LABEL_{i}": i for i in range(rows[-1])}
