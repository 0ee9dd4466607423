"""Small files and tokenizers; the cache of ``datasets`` goes into the test's own folder."""

import json
from types import SimpleNamespace

import pytest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]", *(f"w{i}" for i in range(40)), "good", "bad"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def choose():
    """A data configuration with the schema's defaults."""

    def choose(**options):
        defaults = {
            "task": "classification",
            "name": None,
            "config": None,
            "path": None,
            "splits": {},
            "columns": {},
            "labels": None,
            "metrics": [],
            "max_length": 32,
            "cache": None,
            "max_train_samples": None,
            "max_eval_samples": None,
            "holdout": 0.25,
        }
        assert set(options) <= set(defaults)
        return SimpleNamespace(**{**defaults, **{k: str(v) if k == "path" else v for k, v in options.items()}})

    return choose


@pytest.fixture
def write(tmp_path):
    """Write a file below the test's folder; text or bytes."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def make_tokenizer(kind, **options):
    """Word-level tokenizers: ``bert`` wraps pairs in [CLS] [SEP] [SEP] with token types, ``plain`` adds nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", **options}
    if kind == "bert":
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = ["input_ids", "token_type_ids", "attention_mask"]
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "model_input_names": names}
    else:
        special |= {"eos_token": "[EOS]", "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.fixture
def new_tokenizer():
    return make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer("bert")


@pytest.fixture
def plain_tokenizer():
    return make_tokenizer("plain")


@pytest.fixture
def fitted(tmp_path):
    """A task fitted to rows of a file, and those rows; ``data`` keys as options."""
    from dora_cli.data.sources import load_rows
    from dora_cli.data.tasks import build_task

    def fit(task, rows, **options):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        known = {"columns": {}, "labels": None, "metrics": [], "cache": None, "splits": {}, "holdout": 0.1}
        source = {"name": None, "config": None, "path": str(file), "max_train_samples": None, "max_eval_samples": None}
        choice = SimpleNamespace(**{"task": task, **known, **source, **options})
        found = load_rows(choice, offline=True, seed=1, roles=["train"])
        built = build_task(choice)
        built.fit(found)
        return built, found.splits["train"]

    return fit
