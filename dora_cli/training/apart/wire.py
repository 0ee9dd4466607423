"""Messages between device and cloud, and the bytes they take.

A message is a head of ``HEAD`` bytes, which says what it is and which tensors come with it, and the tensors' own bytes.
Values move as they are, in their own type, by way of the CPU. An answer to a question is one tensor without a head,
since who asks knows its shape.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

HEAD = 512
# What bytes are for: token ids and masks; adapters' inputs and updates, and gradients of both; what the head reads of
# the base model, and its gradient; and all else.
INPUTS, FORWARD, BACKWARD, HIDDEN, CONTROL = "inputs", "adapters_forward", "adapters_backward", "hidden", "control"
KINDS = (INPUTS, FORWARD, BACKWARD, HIDDEN, CONTROL)
RANDOM = "random"  # the name under which a random state travels


@dataclass
class Traffic:
    """Bytes in both directions, by kind, of passes in training and of those without gradients.

    Attributes:
        formula: 2 (d_in + d_out) values for every token and module that is on, in training (METHODS 7).
        unneeded: the part of it that does not cross, because nothing before a module learns from its input's gradient.
    """

    training: Counter[str] = field(default_factory=Counter)
    evaluation: Counter[str] = field(default_factory=Counter)
    formula: int = 0
    unneeded: int = 0

    def count(self, kind: str, size: int, *, training: bool) -> None:
        (self.training if training else self.evaluation)[kind] += size

    def state(self) -> dict[str, Any]:
        """For summaries and checkpoints."""
        counts = {name: {kind: getattr(self, name)[kind] for kind in KINDS} for name in ("training", "evaluation")}
        return {**counts, "formula": self.formula, "unneeded": self.unneeded}

    def load(self, state: Mapping[str, Any]) -> None:
        self.training, self.evaluation = Counter(state["training"]), Counter(state["evaluation"])
        self.formula, self.unneeded = state["formula"], state["unneeded"]


class Message(NamedTuple):
    word: str
    kind: str
    tensors: dict[str, Tensor]
    rest: dict[str, Any]


class Link:
    """One end of the connection.

    Args:
        peer: the other process's rank.
        place: the device on which received tensors are wanted.
    """

    def __init__(self, peer: int, place: torch.device) -> None:
        self.peer, self.place = peer, place
        self.traffic = Traffic()
        self.training = False  # what passes now belongs to a pass with gradients

    def send(self, word: str, tensors: Mapping[str, Tensor] | None = None, *, kind: str = CONTROL, **rest: Any) -> None:
        """A message with tensors of one kind, and what JSON can say."""
        tensors = tensors or {}
        described = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
        text = json.dumps([word, kind, described, rest], separators=(",", ":")).encode()
        if len(text) > HEAD:
            raise ValueError(f"the head of a message '{word}' takes {len(text)} bytes, {HEAD} at most")
        self._send(torch.frombuffer(bytearray(text.ljust(HEAD)), dtype=torch.uint8), CONTROL)
        for name, tensor in tensors.items():
            self._send(tensor, CONTROL if name == RANDOM else kind)

    def receive(self) -> Message:
        head = self._receive((HEAD,), torch.uint8, CONTROL)
        word, kind, described, rest = json.loads(bytes(head.tolist()))
        tensors = {}
        for name, dtype, shape in described:
            tensor = self._receive(shape, getattr(torch, dtype), CONTROL if name == RANDOM else kind)
            tensors[name] = tensor if name == RANDOM else tensor.to(self.place)
        return Message(word, kind, tensors, rest)

    def answer(self, tensor: Tensor, kind: str) -> None:
        self._send(tensor, kind)

    def answered(self, like: Tensor, kind: str) -> Tensor:
        """The answer to what was just asked, of the shape and type of ``like``."""
        return self._receive(like.shape, like.dtype, kind).to(self.place)

    def _send(self, tensor: Tensor, kind: str) -> None:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        self.traffic.count(kind, len(data), training=self.training)
        if len(data):
            self._put(data)

    def _receive(self, shape: Any, dtype: torch.dtype, kind: str) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        data = tensor.flatten().view(torch.uint8)
        self.traffic.count(kind, len(data), training=self.training)
        if len(data):
            self._fill(data)
        return tensor

    def _put(self, data: Tensor) -> None:
        dist.send(data, self.peer)

    def _fill(self, data: Tensor) -> None:
        dist.recv(data, self.peer)


def random_state(place: torch.device) -> Tensor:
    """That of the generator which dropout on a device draws from."""
    if place.type == "cuda":
        return torch.cuda.get_rng_state(place)
    return torch.mps.get_rng_state() if place.type == "mps" else torch.get_rng_state()


def set_random_state(state: Tensor, place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.set_rng_state(state, place)
    elif place.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)
