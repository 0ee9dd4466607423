"""Tiny models of many architectures, as pretrained checkpoints have them."""

import pytest
import torch


@pytest.fixture
def save_base(tmp_path, tiny_models):
    """Write a headless model and a tokenizer into a folder, as a pretrained checkpoint has them."""

    def save(kind, *, folder="base", tokens=None, dtype=torch.float32, **model_options):
        from transformers import AutoModel

        torch.manual_seed(0)
        path = tmp_path / folder
        config = tiny_models.make_config(kind)
        AutoModel.from_config(config, **model_options).to(dtype).save_pretrained(path)
        tokens = tiny_models.ENCODER_TOKENS if tokens is None else tokens
        tiny_models.make_tokenizer(**tokens).save_pretrained(path)
        return path

    return save


@pytest.fixture
def configs(tiny_models):
    return tiny_models.make_config
