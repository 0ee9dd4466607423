"""One adapter, three ways to run it: the toolkit, PEFT, and the merged folder in plain transformers agree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.apply import apply_adapter

peft = pytest.importorskip("peft")

WORDS = 24
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BASES: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertModel(BertConfig(vocab_size=WORDS, max_position_embeddings=40, **SMALL)),
    "roberta": lambda: RobertaForMaskedLM(
        RobertaConfig(vocab_size=WORDS, max_position_embeddings=40, pad_token_id=0, **SMALL)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=40, n_embd=32, n_layer=2, n_head=4)),
}


@pytest.fixture(params=list(BASES))
def base(request: pytest.FixtureRequest, model_dir: Path, tmp_path: Path) -> Path:
    """A pretrained folder of another architecture, with the tiny BERT's tokenizer."""
    torch.manual_seed(1)
    folder = tmp_path / "base"
    BASES[request.param]().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["dora", "dora_official", "adalora", "lora", "aflora"])
def test_logits_agree(method: str, base: Path, dora_train: Any, tmp_path: Path) -> None:
    words = [f"model.name={base}", f"method={method}", "budget=r0.6", "train.epochs=3", "save.merged=true"]
    words += ["adapter.rank=2"] if method != "aflora" else []
    assert dora_train(*words) == 0
    run = tmp_path / "run"
    ranks = json.loads((run / "summary.json").read_text())["ranks"]
    assert 0 in ranks.values()
    assert max(ranks.values()) > 0

    torch.manual_seed(2)
    inputs = {"input_ids": torch.randint(4, WORDS, (6, 11)), "attention_mask": torch.ones(6, 11, dtype=torch.long)}
    inputs["input_ids"][3:, 8:] = 0
    inputs["attention_mask"][3:, 8:] = 0
    fresh = {"num_labels": 2, "pad_token_id": 0, "dtype": torch.float32}

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**inputs).logits  # type: ignore[no-any-return]

    ours = AutoModelForSequenceClassification.from_pretrained(base, **fresh)
    untrained = logits(ours)
    apply_adapter(ours, read_adapter(run))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, **fresh), run / "adapter"
    )
    merged, report = AutoModelForSequenceClassification.from_pretrained(
        run / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    reference = logits(ours)
    assert not torch.allclose(reference, untrained, atol=1e-3), "the adapter changes nothing: a test of nothing"
    assert torch.allclose(reference, logits(theirs), atol=1e-5)
    assert torch.allclose(reference, logits(merged), atol=1e-5)


def test_uniform_export_has_one_rank_no_patterns_and_the_same_logits(
    base: Path, dora_train: Any, tmp_path: Path
) -> None:
    words = [f"model.name={base}", "budget=r0.6", "adapter.rank=2", "train.epochs=3"]
    assert dora_train(*words, "export=uniform") == 0
    run = tmp_path / "run"
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["lora_alpha"] == config["r"]
    assert len(config["target_modules"]) == len(json.loads((run / "summary.json").read_text())["ranks"])
    fresh = {"num_labels": 2, "pad_token_id": 0, "dtype": torch.float32}
    ids = torch.randint(4, WORDS, (3, 9))
    ours = AutoModelForSequenceClassification.from_pretrained(base, **fresh)
    apply_adapter(ours, read_adapter(run))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, **fresh), run / "adapter"
    )
    with torch.no_grad():
        assert torch.allclose(ours.eval()(ids).logits, theirs.eval()(ids).logits, atol=1e-5)
