"""A run in this process with its trained model at hand, to compare with what was saved."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BATCH = {
    "input_ids": torch.tensor([[2, 5, 12, 9, 3], [2, 14, 16, 3, 0], [2, 21, 7, 8, 3]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
}


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**BATCH).logits


@dataclass
class Trained:
    """A finished run: its folder, its session, and the logits of the model as trained."""

    out: Path
    session: Any
    logits: Tensor

    logits_of = staticmethod(logits)

    def base_logits(self) -> Tensor:
        """Those of the trained head on the base, without adapters."""
        layers = [layer for layer in self.session.layers.values() if layer.active]
        for layer in layers:
            layer.active = False
        without = logits(self.session.model)
        for layer in layers:
            layer.active = True
        return without

    def fresh_model(self) -> Any:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        name = self.session.config.model.name
        config = AutoConfig.from_pretrained(name, num_labels=2)
        return AutoModelForSequenceClassification.from_pretrained(name, config=config)


@pytest.fixture
def run(model_dir: Path, data_dir: Path, tmp_path: Path, composed: Callable[..., Any]) -> Callable[..., Trained]:
    """Compose, build and train ten steps on the tiny model; the export is that of the last step."""
    from dora_cli.cli.parts import load_parts
    from dora_cli.cli.train_run import _begin, _Run
    from dora_cli.training.setup import build

    def train(*overrides: str) -> Trained:
        out = tmp_path / "run"
        words = {
            "recipe": "text_classification",
            "method": "lora",
            "model.name": str(model_dir),
            "data.path": str(data_dir),
            "data.max_length": 16,
            "train.batch_size": 8,
            "train.max_steps": 10,
            "train.eval_every": 10,
            "train.save_every": 10,
            "train.warmup": 0.0,
            "train.learning_rate": 0.05,
            "train.scheduler": "constant",
            "save.which": "last",
            "out": str(out),
        } | dict(word.split("=", 1) for word in overrides)
        run = composed([f"{key}={value}" for key, value in words.items()], load_parts())
        session = build(run, _begin(run))
        assert _Run(session, out).go() == 0
        return Trained(out, session, logits(session.model))

    return train
