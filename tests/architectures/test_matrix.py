"""Every architecture: twenty steps with pruning to half, interrupted, resumed, merged, exported."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

CLASSIFIER, LANGUAGE, BODY = "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModel"
MASKED = "AutoModelForMaskedLM"

# architecture → its task's class, what its checkpoint was saved from, and how many modules are adapted
MATRIX: dict[str, tuple[str, str, int]] = {
    "bert": (CLASSIFIER, MASKED, 12),
    "roberta": (CLASSIFIER, MASKED, 12),
    "deberta_v1": (CLASSIFIER, MASKED, 12),
    "deberta": (CLASSIFIER, MASKED, 12),
    "distilbert": (CLASSIFIER, MASKED, 12),
    "electra": (CLASSIFIER, "AutoModelForPreTraining", 12),
    "albert": (CLASSIFIER, MASKED, 6),  # one set of weights for both depths
    "modernbert": (CLASSIFIER, MASKED, 8),
    "bart": (CLASSIFIER, BODY, 32),
    "t5": (CLASSIFIER, BODY, 32),
    "t5_gated": (CLASSIFIER, "AutoModelForSeq2SeqLM", 36),
    "gpt2": (LANGUAGE, BODY, 8),
    "gpt_neox": (LANGUAGE, LANGUAGE, 8),
    "opt": (LANGUAGE, LANGUAGE, 6),
    "llama": (CLASSIFIER, LANGUAGE, 14),
    "mistral": (LANGUAGE, LANGUAGE, 14),
    "qwen2": (LANGUAGE, LANGUAGE, 14),
    "qwen3": (LANGUAGE, LANGUAGE, 14),
    "gemma": (LANGUAGE, LANGUAGE, 14),
    "gemma2": (CLASSIFIER, LANGUAGE, 14),
    "gemma3": (LANGUAGE, LANGUAGE, 14),
    "phi": (LANGUAGE, LANGUAGE, 12),
    "phi3": (LANGUAGE, LANGUAGE, 8),
    "mixtral": (CLASSIFIER, LANGUAGE, 8),
    "qwen2_moe": (LANGUAGE, LANGUAGE, 14),
    "qwen3_moe": (LANGUAGE, LANGUAGE, 8),
    "olmoe": (LANGUAGE, LANGUAGE, 8),
}
# Near relations of others.
SLOW = ("roberta", "electra", "deberta_v1", "t5_gated", "opt", "mistral", "qwen2", "gemma2", "gemma3", "phi3")
SLOW += ("qwen2_moe", "qwen3_moe", "olmoe")
RANK = 4


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in MATRIX])
def test_pruned_resumed_merged_and_exported(
    kind: str, save_base: Callable[..., Any], tune_twice: Callable[..., Any], check_same: Callable[..., Any]
) -> None:
    auto_class, saved_as, n_targets = MATRIX[kind]
    save_base(kind, auto_class, saved_as)
    whole, run = tune_twice(auto_class)

    ranks = json.loads((run.out / "summary.json").read_text())["ranks"]
    assert len(ranks) == len(run.session.targets) == n_targets
    assert sum(ranks.values()) == round(0.5 * n_targets * RANK) == run.session.allocation.alive_count()
    assert len(set(ranks.values())) > 1 or kind == "albert", "every module kept as many: nothing competed"

    saved, resumed = (load_file(r.out / "adapter/adapter_model.safetensors") for r in (whole, run))
    assert saved.keys() == resumed.keys() and all(torch.equal(saved[name], resumed[name]) for name in saved)
    assert sum(t.shape[0] for name, t in saved.items() if name.endswith("lora_A.weight")) == sum(ranks.values())

    trained = check_same(run)
    untrained = run.logits(_without_adapters(run.session))
    assert (trained - untrained).abs().max() > 1e-2, "the adapter does nothing: a test of nothing"


def _without_adapters(session: Any) -> Any:
    for layer in session.layers.values():
        layer.active = False
    return session.model
