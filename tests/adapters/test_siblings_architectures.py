"""Layers computed as one node in tiny models of several architectures: the groups found, and the same gradients."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import inject
from dora_cli.adapters.siblings import join
from dora_cli.models.targets import find_targets

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
T = transformers
ARCHITECTURES: dict[str, tuple[Any, list[int]]] = {  # how many layers each group has
    "bert": (lambda: T.BertForSequenceClassification(T.BertConfig(**SMALL)), [3, 3]),
    "distilbert": (
        lambda: T.DistilBertForSequenceClassification(
            T.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        ),
        [3, 3],
    ),
    "albert": (lambda: T.AlbertForSequenceClassification(T.AlbertConfig(**SMALL, embedding_size=8)), [3]),
    "deberta": (
        lambda: T.DebertaV2ForSequenceClassification(
            T.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True)
        ),
        [],
    ),
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**SMALL)), [3, 3, 2, 2]),
    "gpt2": (lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)), []),
    "bart": (
        lambda: T.BartForConditionalGeneration(
            T.BartConfig(
                vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, bos_token_id=0, pad_token_id=1,
                eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
            )
        ),
        [3, 3, 2],
    ),
    "t5": (
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(
                vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
            )
        ),
        [3, 2, 3, 2, 2],
    ),
}  # fmt: skip


def trained(kind: str, *, joined: bool, recomputed: bool) -> tuple[list[list[str]], list[Tensor]]:
    """The groups, the loss of a training step and every gradient of the adapters."""
    torch.manual_seed(0)
    model = ARCHITECTURES[kind][0]().requires_grad_(False)
    part = Components(dropout=0.2)
    targets = find_targets(model, None, exclude=[])
    layers: Any = inject(model, targets, part, [4] * len(targets))
    for layer in layers.values():
        nn.init.normal_(layer.c)
    part.masks(layers, 1)
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1]) if "SequenceClassification" in type(model).__name__ else ids
    groups = []
    if joined:
        with torch.no_grad():
            groups = join(layers, lambda: model.eval()(input_ids=ids, labels=labels))
    if recomputed:
        switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        switch({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the model's own
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return groups, [loss.detach(), *(p.grad for layer in layers.values() for p in (layer.a, layer.b, layer.c))]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_groups_and_gradients(kind: str) -> None:
    expected = ARCHITECTURES[kind][1]
    _, alone = trained(kind, joined=False, recomputed=False)
    for recomputed in (False, True) if kind != "albert" else (False,):  # ALBERT cannot recompute
        groups, together = trained(kind, joined=True, recomputed=recomputed)
        assert sorted(len(group) for group in groups) == sorted(expected)
        for one, other in zip(alone, together, strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
