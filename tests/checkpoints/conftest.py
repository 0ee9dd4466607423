"""Tiny bases as users have them (bare bodies, other heads), classifiers on them, and random trained adapters."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dora_cli.checkpoints import adapter_format
from dora_cli.checkpoints.adapter_format import LowRank, write_adapter

# architecture → (config class, its arguments, class the base is saved from, base_model_prefix, head)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "bert": (
        "BertConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
        "BertModel",  # bare names, as sentence encoders are saved
        "bert",
        "classifier",
    ),
    "roberta": (
        "RobertaConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
        "RobertaForMaskedLM",  # a head that the classifier does not have
        "roberta",
        "classifier",
    ),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0},
        "GPT2LMHeadModel",
        "transformer",
        "score",
    ),
    "llama": (
        "LlamaConfig",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "pad_token_id": 0,
        },
        "LlamaForCausalLM",
        "model",
        "score",
    ),
}


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters without a manifest, as PEFT writes them: what stands in the files is all that can be checked."""
    monkeypatch.setattr(adapter_format, "write_manifest", lambda folder: None)


@dataclass
class Case:
    """A saved base, a classifier with its weights and a random head, and a random update of its linear layers."""

    base: Path
    model: nn.Module
    prefix: str
    head_module: str
    updates: list[LowRank] = field(default_factory=list)

    @property
    def head(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if n.startswith(f"{self.head_module}.")}

    @property
    def method(self) -> dict[str, Any]:
        return {
            "architecture": type(self.model).__name__,
            "base_model_prefix": self.prefix,
            "model_config": self.model.config.to_dict(),
        }

    def dense(self) -> nn.Module:
        """The adapted model, each weight added up in float64."""
        model = deepcopy(self.model)
        for update in self.updates:
            weight = model.get_submodule(update.name).weight
            delta = update.b.double() @ update.a.double()
            weight.data = (weight.double() + (delta.T if update.transposed else delta)).to(weight.dtype)
        return model

    @staticmethod
    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        torch.manual_seed(1)
        ids = torch.randint(3, 60, (3, 9))
        mask = torch.ones_like(ids)
        ids[1, 6:], mask[1, 6:] = 0, 0
        return model.eval()(input_ids=ids, attention_mask=mask).logits.float()

    @staticmethod
    def load_merged(folder: Path, **options: Any) -> nn.Module:
        """The folder through plain transformers; nothing may be missing or left over."""
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True, **options
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        return model

    def write(self, folder: Path, **changes: Any) -> Path:
        """The adapter as our own training writes it."""
        arguments: dict[str, Any] = {
            "modules": self.updates,
            "head": self.head,
            "head_modules": [self.head_module],
            "base_name": str(self.base),
            "task_type": "SEQ_CLS",
            "method": self.method,
        }
        write_adapter(folder, **(arguments | changes))
        return folder


def targets(model: nn.Module, prefix: str) -> list[str]:
    """Linear layers inside the transformer layers."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and n.startswith(prefix) and "pooler" not in n]


def build(
    kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, saved: str | None = None, **save: Any
) -> Case:
    torch.manual_seed(0)
    config_class, arguments, saved_class, prefix, head_module = ARCHITECTURES[kind]
    config = getattr(transformers, config_class)(vocab_size=60, num_labels=3 if saved else 2, **arguments)
    base = getattr(transformers, saved or saved_class)(config).to(dtype)
    base.save_pretrained(folder, **save)
    (folder / "tokenizer_config.json").write_text("{}")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=dtype).eval()
    for name, parameter in model.named_parameters():  # biases of 0 and norms of 1 would hide mistakes
        if name.startswith(f"{head_module}."):
            parameter.data.add_(torch.randn_like(parameter) * 0.5)
    case = Case(folder, model, prefix, head_module)
    for i, name in enumerate(targets(model, prefix)):
        module = model.get_submodule(name)
        transposed = not isinstance(module, nn.Linear)
        d_out, d_in = module.weight.shape[::-1] if transposed else module.weight.shape
        rank = i % 4
        case.updates.append(LowRank(name, torch.randn(rank, d_in) / 4, torch.randn(d_out, rank) / 4, transposed))
    return case


@pytest.fixture
def make_case(tmp_path: Path) -> Callable[..., Case]:
    return lambda kind, name="base", **options: build(kind, tmp_path / name, **options)
