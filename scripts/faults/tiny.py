"""A tiny BERT with random weights and a sentiment set that it can learn: what tests and fault campaigns run on."""

import json
import os
import random
from pathlib import Path

import torch

GOOD = ["good", "great", "fine", "lovely", "bright"]
BAD = ["bad", "awful", "poor", "dull", "grim"]
FILLER = ["the", "film", "was", "a", "story", "and", "plot", "with", "cast", "of"]


def make_model(folder: Path) -> Path:
    """Two layers of width 16, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

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


def make_data(folder: Path) -> Path:
    """``train.jsonl`` of 96 rows and ``validation.jsonl`` of 32: text and label."""
    draw = random.Random(0)
    for split, n in (("train", 96), ("validation", 32)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for i in range(n):
                words = [*draw.choices(FILLER, k=draw.randint(2, 9)), draw.choice((BAD, GOOD)[i % 2])]
                draw.shuffle(words)
                file.write(json.dumps({"text": " ".join(words), "label": ("negative", "positive")[i % 2]}) + "\n")
    return folder


def make(folder: Path) -> None:
    """Both, in ``model`` and ``data`` of a folder that need not be there."""
    for name, made in (("model", make_model), ("data", make_data)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        made(folder / name)


def before_forks() -> None:
    """Threads do not survive a fork: have none when it comes."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
