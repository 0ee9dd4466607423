"""The base in another process, for every architecture: losses and gradients are those of one process.

Two threads stand for the processes here; the messages are the real ones.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_cli.adapters.base import LowRankLayer
from dora_cli.cli.apart_run import load_body
from dora_cli.cli.parts import load_parts
from dora_cli.errors import UserError
from dora_cli.training.apart.cloud import Cloud
from dora_cli.training.apart.device import send_away
from dora_cli.training.apart.seam import find_seam
from dora_cli.training.apart.wire import Link
from dora_cli.training.setup import build

CLASSIFIER, LANGUAGE = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
MASKED, BODY = "AutoModelForMaskedLM", "AutoModel"
TASKS = {CLASSIFIER: "text_classification", LANGUAGE: "clm_text"}
CPU = torch.device("cpu")
WORDS = ["adapter.dropout=0.1", "budget=r2", "data.max_length=12", "data.cache=null", "train.device=cpu"]


class Pipe(Link):
    """One end of a link between two threads."""

    def __init__(self, out: "Queue[bytes]", back: "Queue[bytes]") -> None:
        super().__init__(0, CPU)
        self.out, self.back = out, back

    def _put(self, data: Tensor) -> None:
        self.out.put(bytes(data.numpy().tobytes()))

    def _fill(self, data: Tensor) -> None:
        data.copy_(torch.frombuffer(bytearray(self.back.get(timeout=30)), dtype=torch.uint8))


@pytest.fixture
def taken_apart() -> Iterator[Callable[[Any, Any], None]]:
    """Let a thread have the session's base."""
    ends: list[Any] = []

    def split(composed: Any, session: Any) -> None:
        there, here = Queue(), Queue()  # type: ignore[var-annotated]
        cloud = Cloud(load_body(composed), Pipe(here, there), session.autocast_dtype)
        device, thread = Pipe(there, here), Thread(target=cloud.serve, daemon=True)
        thread.start()
        ends.append((device, thread))
        send_away(session, device, find_seam(session))

    yield split
    for device, thread in ends:
        device.send("end", code=0)
        thread.join()


def step(session: Any, batch: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of a training pass and the gradients of all that trains."""
    torch.manual_seed(5)
    session.model.train()
    loss = session.task.loss(session.model, batch).total
    loss.backward()
    grads = {n: p.grad for n, p in session.model.named_parameters() if p.grad is not None}
    session.model.zero_grad(set_to_none=True)
    return float(loss.detach()), grads


CASES = {
    "bert": (CLASSIFIER, MASKED),  # its pooler is new, and trains on the device
    "bart": (CLASSIFIER, BODY),
    "qwen2": (LANGUAGE, LANGUAGE),  # its output layer is the embedding
    **dict.fromkeys(("roberta", "deberta_v1", "deberta", "distilbert", "albert", "modernbert"), (CLASSIFIER, MASKED)),
    "t5": (CLASSIFIER, BODY),
    **dict.fromkeys(("llama", "gemma2", "mixtral"), (CLASSIFIER, LANGUAGE)),
    "gpt2": (LANGUAGE, BODY),
    **dict.fromkeys(("gpt_neox", "mistral", "qwen3", "gemma", "gemma3", "phi", "phi3"), (LANGUAGE, LANGUAGE)),
    **dict.fromkeys(("qwen2_moe", "olmoe"), (LANGUAGE, LANGUAGE)),
}
FAST = ("bert", "bart", "qwen2")


@pytest.fixture
def session_of(save_base: Callable[..., Path], texts: Path) -> Callable[..., tuple[Any, Any]]:
    """Configuration and session of a tiny base, whose adapters have moved."""
    from dora_cli.config.compose import compose

    def make(kind: str, auto_class: str, saved_as: str, *words: str) -> tuple[Any, Any]:
        where = [f"recipe={TASKS[auto_class]}", f"model.name={save_base(kind, auto_class, saved_as)}"]
        composed = compose([*where, f"data.path={texts}", "method=lora", *WORDS, *words], load_parts(), [])
        session = build(composed)
        with torch.no_grad():
            for layer in session.layers.values():
                for parameter in layer.adapter_parameters().values():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return composed, session

    return make


@pytest.mark.parametrize(
    ("kind", "words", "tolerance"),
    [
        *[pytest.param(k, [], 1e-5, marks=[] if k in FAST else pytest.mark.slow) for k in CASES],
        ("qwen2", ["train.precision=bf16"], 3e-2),
    ],
)
def test_losses_and_gradients_are_those_of_one_process(
    kind: str,
    words: list[str],
    tolerance: float,
    session_of: Callable[..., Any],
    taken_apart: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    composed, session = session_of(kind, *CASES[kind], *words)
    batch = session.encoded["train"].batch(range(4))
    loss, gradients = step(session, batch)
    with monkeypatch.context() as patch:
        patch.setattr(LowRankLayer, "fuses", lambda self, x: False)
        plain = step(session, batch)
    taken_apart(composed, session)
    base = session.model.base_model
    assert all(p.is_meta for m in base.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters())
    again, from_afar = step(session, batch)
    assert again == pytest.approx(loss, rel=tolerance / 10)
    # Where one process adds an adapter to its base as two processes do, the bits are the same.
    assert again == plain[0] and all(torch.equal(from_afar[name], gradient) for name, gradient in plain[1].items())
    assert gradients.keys() == from_afar.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(from_afar[name], gradient, rtol=0, atol=tolerance * float(gradient.abs().max())), name
    traffic = session.traffic
    crossed = traffic.training["adapters_forward"] + traffic.training["adapters_backward"]
    assert crossed == traffic.formula - traffic.unneeded > 0


def test_a_model_that_calls_its_base_in_parts_is_refused(session_of: Callable[..., Any]) -> None:
    _, session = session_of("opt", LANGUAGE, LANGUAGE)
    with pytest.raises(UserError, match="OPTForCausalLM has no base model that it calls as a whole"):
        find_seam(session)


def test_another_base_in_the_other_process_is_noticed(
    session_of: Callable[..., Any], taken_apart: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    composed, session = session_of("qwen2", LANGUAGE, LANGUAGE)

    real = load_body

    def another(composed: Any) -> torch.nn.Module:
        body = real(composed)
        with torch.no_grad():
            next(body.parameters()).mul_(2.0)
        return body

    monkeypatch.setattr(sys.modules[__name__], "load_body", another)
    with pytest.raises(UserError, match="do not hold the same base model"):
        taken_apart(composed, session)
