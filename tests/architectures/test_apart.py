"""The base in another process, for every architecture: losses and gradients are those of one process.

Two threads stand for the processes here; the messages are the real ones.
"""

from collections.abc import Callable
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_cli.cli.apart_run import load_body
from dora_cli.cli.parts import load_parts
from dora_cli.training.apart.cloud import Cloud
from dora_cli.training.apart.device import send_away
from dora_cli.training.apart.wire import Link
from dora_cli.training.setup import build

CLASSIFIER, LANGUAGE = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
MASKED, BODY = "AutoModelForMaskedLM", "AutoModel"
CPU = torch.device("cpu")
WORDS = ["adapter.dropout=0.1", "budget=r2", "data.max_length=12", "data.cache=null", "train.device=cpu"]


class Thread2(Link):
    """One end of a link between two threads."""

    def __init__(self, out: "Queue[bytes]", back: "Queue[bytes]") -> None:
        super().__init__(0, CPU)
        self.out, self.back = out, back

    def _put(self, data: Tensor) -> None:
        self.out.put(bytes(data.numpy().tobytes()))

    def _fill(self, data: Tensor) -> None:
        data.copy_(torch.frombuffer(bytearray(self.back.get(timeout=30)), dtype=torch.uint8))


@pytest.fixture
def taken_apart() -> Callable[[Any, Any], None]:
    """Let a thread have the session's base."""

    def split(composed: Any, session: Any) -> None:
        there, here = Queue(), Queue()  # type: ignore[var-annotated]
        cloud = Cloud(load_body(composed), Thread2(here, there), session.autocast_dtype)
        Thread(target=cloud.serve, daemon=True).start()
        send_away(session, Thread2(there, here))

    return split


def step(session: Any, batch: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of a training pass and the gradients of all that trains."""
    torch.manual_seed(5)
    session.model.train()
    loss = session.task.loss(session.model, batch).total
    loss.backward()
    grads = {n: p.grad for n, p in session.model.named_parameters() if p.grad is not None}
    session.model.zero_grad(set_to_none=True)
    return float(loss.detach()), grads


@pytest.mark.parametrize(
    ("kind", "auto_class", "saved_as", "words"),
    [
        ("bert", CLASSIFIER, MASKED, ()),  # its pooler is new, and trains on the device
        *[
            (k, CLASSIFIER, MASKED, ())
            for k in ["roberta", "deberta_v1", "deberta", "distilbert", "albert", "modernbert"]
        ],
        *[(k, CLASSIFIER, BODY, ()) for k in ["bart", "t5"]],
        *[(k, CLASSIFIER, LANGUAGE, ()) for k in ["llama", "gemma2", "mixtral"]],
        *[(k, LANGUAGE, BODY, ()) for k in ["gpt2"]],
        *[
            (k, LANGUAGE, LANGUAGE, ())
            for k in [
                "gpt_neox",
                "opt",
                "mistral",
                "qwen2",
                "qwen3",
                "gemma",
                "gemma3",
                "phi",
                "phi3",
                "qwen2_moe",
                "olmoe",
            ]
        ],
    ],
)
def test_a_step(
    kind: str, auto_class: str, saved_as: str, words: tuple[str, ...], save_base: Any, texts: Path, taken_apart: Any
) -> None:
    from dora_cli.config.compose import compose

    folder = save_base(kind, auto_class, saved_as)
    recipe = {CLASSIFIER: "text_classification", LANGUAGE: "clm_text"}[auto_class]
    where = [f"recipe={recipe}", f"model.name={folder}", f"data.path={texts}", "method=lora"]
    composed = compose([*where, *WORDS, *words], load_parts(), [])
    session = build(composed)
    with torch.no_grad():
        for layer in session.layers.values():
            for p in layer.adapter_parameters().values():
                p.add_(torch.randn_like(p) * 0.1)
    batch = session.encoded["train"].batch(range(4))
    loss, grads = step(session, batch)
    taken_apart(composed, session)
    assert all(p.is_meta for n, p in session.model.base_model.named_parameters() if n.startswith("embeddings.word"))
    loss_apart, grads_apart = step(session, batch)
    print(loss, loss_apart, session.traffic.state())
    assert loss_apart == pytest.approx(loss, abs=1e-6 * max(1, abs(loss)))
    assert grads.keys() == grads_apart.keys()
    for name, grad in grads.items():
        assert torch.allclose(grads_apart[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), name
