"""Packed documents: all there, none cut, none sees another, and the losses are those of each alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_cli.data.encoded import Encoded
from dora_cli.data.packing import _filled, pack
from dora_cli.data.tasks.sft import Sft
from dora_cli.data.token_rows import IGNORED

VOCABULARY = 40


def documents(lengths: list[int], side: str = "right") -> Encoded:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (sum(lengths),), generator=generator).int()
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    labels = tokens.clone()
    labels[torch.rand(len(labels), generator=generator) < 0.3] = IGNORED
    labels[offsets[:-1]] = IGNORED
    ragged, pads = {"input_ids": tokens, "labels": labels}, {"input_ids": 0, "labels": IGNORED}
    return Encoded(ragged, offsets, {}, pads, side, ids=[f"d{i}" for i in range(len(lengths))])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 50))
@settings(max_examples=200, deadline=None)
def test_every_document_has_one_place_and_rows_are_close_to_full(lengths: list[int], room: int) -> None:
    rows = _filled(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert max(sizes) <= room
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // (room - max(lengths) + 1)) + 1
    assert sum(1 for size in sizes if size <= room / 2) <= 1, "two half-empty rows would be one"


def test_tokens_labels_and_positions_one_by_one() -> None:
    encoded = documents([3, 5, 2, 4])
    encoded.truncated = 3
    packed = pack(encoded, 8)
    assert packed.truncated == 3
    assert len(packed) == 2
    assert packed[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert packed[1]["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]
    for name in ("input_ids", "labels"):
        rows = [encoded[i][name].tolist() for i in range(4)]
        assert packed[0][name].tolist() == rows[1] + rows[0]
        assert packed[1][name].tolist() == rows[3] + rows[2]
    assert [packed.place(i) for i in (0, 1)] == [1, 3]
    assert packed.notes == ["4 documents packed into 2 rows of up to 8 tokens"]


def model_of(kind: str) -> Any:
    import transformers as t

    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = {**small, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    configs = {
        "llama": lambda: t.LlamaConfig(**llama),
        "qwen3": lambda: t.Qwen3Config(**llama),
        "mistral": lambda: t.MistralConfig(**llama, sliding_window=6),
        "gemma2": lambda: t.Gemma2Config(**llama, sliding_window=6),
        "gpt2": lambda: t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "gpt_neox": lambda: t.GPTNeoXConfig(**small, intermediate_size=48, max_position_embeddings=64),
        "phi": lambda: t.PhiConfig(**small, intermediate_size=48, max_position_embeddings=64),
    }
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(configs[kind]()).eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "phi"])
def test_packed_losses_are_those_of_documents_alone(kind: str, side: str) -> None:
    model, encoded = model_of(kind), documents([9, 4, 12, 3, 7, 10], side)
    task = Sft(SimpleNamespace(labels=None, metrics=[], answer=None))  # type: ignore[arg-type]
    packed = pack(encoded, 16)
    batch = packed.batch(range(len(packed)))
    assert batch["input_ids"].shape[0] < len(encoded)
    together = task.loss(model, batch)
    alone = [task.loss(model, encoded.batch([i])) for i in range(len(encoded))]
    assert together.n == sum(loss.n for loss in alone)
    total = sum(float(loss.total) for loss in alone)
    assert float(together.total) == pytest.approx(total, rel=1e-5)
    without = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
    assert abs(float(task.loss(model, without).total) - total) > 1e-3, "the check could not fail"
    gradients = []
    for losses in ([together], alone):
        model.zero_grad()
        sum(loss.total for loss in losses).backward()  # type: ignore[union-attr]
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-4)
