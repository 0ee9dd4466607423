"""Gated models, encoders where a decoder is needed, and weights that are taken as they are stored."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_cli.config.schema import ModelConfig
from dora_cli.errors import UserError
from dora_cli.models.load import load_model


def load(name: str, **options: Any) -> Any:
    return load_model(ModelConfig(name), auto_class="AutoModelForCausalLM", **options)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_where_to_ask_and_how_to_log_in(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client raises what it raises for such an answer; transformers makes an OSError of it."""
    from huggingface_hub.errors import GatedRepoError
    from transformers.utils import hub

    def refuse(*_: Any, **__: Any) -> None:
        answer = SimpleNamespace(status_code=status, headers={}, request=None)
        raise GatedRepoError(f"{status} Client Error. Cannot access gated repo", response=answer)  # type: ignore[arg-type]

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(UserError) as caught:
        load("meta-llama/Llama-3.2-1B-Instruct", offline=False)
    assert "licence to be accepted" in caught.value.message
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct" in caught.value.hint
    assert "hf auth login" in caught.value.hint


def test_as_stored_keeps_the_type_and_the_very_same_numbers(save_decoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = str(save_decoder(tmp_path, ["a", "b"], None, "Llama", torch.bfloat16))
    stored, whole = (load(folder, offline=True, as_stored=as_stored).model for as_stored in (True, False))
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    for (name, one), two in zip(stored.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one.float(), two), name


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder_is_no_language_model(save_base: Callable[..., Path], kind: str) -> None:
    with pytest.raises(UserError, match="is an encoder: it would see the tokens that it has to predict"):
        load(str(save_base(kind)), offline=True)
