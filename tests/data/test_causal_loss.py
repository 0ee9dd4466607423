"""The loss of a language model: cross-entropy of what is learned, without waiting for the device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dora_cli.data.tasks import build_task
from dora_cli.data.tasks.token_task import TokenLoss
from dora_cli.data.token_rows import IGNORED


def test_losses_and_gradients_are_those_of_cross_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 700, 40, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 40, (3, 700))
    labels[torch.rand(3, 700) < 0.4] = IGNORED
    labels[2] = IGNORED
    losses, right = TokenLoss.apply(logits, labels)
    weights = torch.rand(3, 700)
    (losses * weights).sum().backward()
    mine, logits.grad = logits.grad, None
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 700)
    (expected * weights).sum().backward()
    assert torch.allclose(losses.double(), expected, atol=1e-5)
    assert torch.allclose(mine, logits.grad, atol=1e-6)
    assert torch.equal(right.bool(), (logits.argmax(-1) == labels))


def test_the_host_asks_a_loss_for_nothing() -> None:
    class Asked(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    weight = torch.randn(9, 9, requires_grad=True)
    task = build_task(SimpleNamespace(task="sft", labels=None, metrics=[], answer=None, template=None))
    tokens = torch.randint(0, 9, (2, 300))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    def model(input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=F.embedding(input_ids, weight))

    with Asked() as asked:
        task.loss(model, batch).total.backward()
        assert asked.number == 0
        task.count(batch)
        assert asked.number == 1, "the check sees something"


def test_bfloat16_gradients_are_rounded_once() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 300, 30).bfloat16().requires_grad_()
    labels = torch.randint(0, 30, (2, 300))
    losses, _ = TokenLoss.apply(logits, labels)
    (losses.sum() / 401).backward()
    exact = logits.detach().double().requires_grad_()
    (F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="sum") / 401).backward()
    assert logits.grad is not None and exact.grad is not None
    ratio = float((logits.grad.double() * exact.grad).sum() / exact.grad.square().sum())
    assert ratio == pytest.approx(1, abs=5e-4)
