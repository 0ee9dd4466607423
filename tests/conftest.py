"""Shared by all rooms: small adapted stacks of linear layers, a tiny pretrained BERT with a sentiment set it can learn,
and one thread, since tiny tensors gain from no more.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dora_cli.adapters.base import AdapterLayer
from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import inject
from dora_cli.adapters.part import LowRankPart

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

Stack = tuple[nn.Module, dict[str, AdapterLayer]]


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a run keeps for the next one (tokens) stays out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def stack() -> Callable[..., Stack]:
    """Build ``n`` linear layers with tanh between, adapted, c, b shaken so that nothing is zero by accident."""

    def make(
        n: int = 4,
        width: int = 16,
        rank: int = 6,
        part: LowRankPart | None = None,
        *,
        seed: int = 0,
        shake: bool = True,
    ) -> Stack:
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for _ in range(n):
            modules += [nn.Linear(width, width), nn.Tanh()]
        model = nn.Sequential(*modules)
        model.requires_grad_(False)
        layers = inject(model, [str(2 * i) for i in range(n)], part or Components(), [rank] * n)
        if shake:
            with torch.no_grad():
                for layer in layers.values():
                    for parameter in layer.adapter_parameters().values():
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        return model, layers

    return make


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
