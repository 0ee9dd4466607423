"""The bases that a step is timed on: shapes by name or a folder's configuration, with random weights, and a batch."""

import argparse
import copy
from typing import Any

import torch
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    # 6 layers of width 384, as MiniLM
    "minilm": {"type": "bert", "layers": 6, "width": 384, "inner": 1536, "heads": 12, "vocabulary": 30522},
    "roberta-base": {"type": "roberta", "layers": 12, "width": 768, "inner": 3072, "heads": 12, "vocabulary": 50265},
    "llama-1b": {"type": "llama", "layers": 16, "width": 2048, "inner": 8192, "heads": 32, "vocabulary": 32000},
    "llama-8b": {"type": "llama", "layers": 32, "width": 4096, "inner": 14336, "heads": 32, "vocabulary": 128256},
    "tiny-llama": {"type": "llama", "layers": 2, "width": 256, "inner": 512, "heads": 8, "vocabulary": 100},
    "tiny": {"type": "bert", "layers": 2, "width": 64, "inner": 128, "heads": 4, "vocabulary": 100},
}


def config_of(name: str) -> Any:
    """The configuration of one of ``SHAPES``, or the one in a folder."""
    import transformers

    if name not in SHAPES:
        return transformers.AutoConfig.from_pretrained(name)
    shape = SHAPES[name]
    sizes = {
        "hidden_size": shape["width"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "vocab_size": shape["vocabulary"],
    }
    if shape["type"] == "llama":
        sizes["num_key_value_heads"] = 8
    config = transformers.AutoConfig.for_model(shape["type"], **sizes)
    # No dropout of the base's own: it would weigh on every variant alike and blur the ratios.
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
        setattr(config, dropout, 0.0)
    return config


def is_decoder(config: Any) -> bool:
    """Whether it predicts the next token here; encoders classify a sequence."""
    import transformers

    return type(config) not in transformers.AutoModelForMaskedLM._model_mapping


def build_base(name: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, int]:
    """A frozen model with random weights, and the size of its vocabulary."""
    import transformers

    torch.manual_seed(0)
    config = config_of(name)
    auto = transformers.AutoModelForCausalLM if is_decoder(config) else transformers.AutoModelForSequenceClassification
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype)
    return model.requires_grad_(False), config.vocab_size


def twin(base: nn.Module) -> Any:
    """A copy of the modules over the very same weights."""
    return copy.deepcopy(base, memo={id(t): t for t in [*base.parameters(), *base.buffers()]})


def random_batch(vocabulary: int, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (options.batch, options.length), generator=generator)
    decoder = is_decoder(config_of(options.model))
    labels = ids if decoder else torch.randint(0, 2, (options.batch,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {k: v.to(options.device) for k, v in batch.items()}
