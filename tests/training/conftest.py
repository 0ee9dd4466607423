"""A tiny pretrained BERT with its tokenizer, and a sentiment set that it can learn, made in a temporary folder."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

GOOD = ["good", "great", "fine", "lovely", "bright"]
BAD = ["bad", "awful", "poor", "dull", "grim"]
FILLER = ["the", "film", "was", "a", "story", "and", "plot", "with", "cast", "of"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for split, n in (("train", 96), ("validation", 32)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(n):
                words = [*draw.choices(FILLER, k=draw.randint(2, 9)), draw.choice((BAD, GOOD)[i % 2])]
                draw.shuffle(words)
                file.write(json.dumps({"text": " ".join(words), "label": ("negative", "positive")[i % 2]}) + "\n")
    return folder


@pytest.fixture
def dora_train(model_dir: Path, data_dir: Path, tmp_path: Path) -> Callable[..., int]:
    """Run the real command in this process on the tiny model and data; returns its exit code."""
    from dora_cli.cli.train import main

    def run(*overrides: str, **options: Any) -> int:
        defaults = {
            "model.name": str(model_dir),
            "data.path": str(data_dir),
            "data.max_length": 16,
            "train.batch_size": 8,
            "train.epochs": 5,
            "train.learning_rate": 0.01,
            "out": str(tmp_path / "run"),
        }
        given = {word.split("=", 1)[0] for word in overrides}
        words = [f"{key}={value}" for key, value in defaults.items() if key not in given]
        if "recipe" not in given:
            words.insert(0, "recipe=text_classification")
        return main([*words, *overrides])

    return run
