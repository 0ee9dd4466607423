"""Data parallelism: every process computes its share of each batch, and gradients are added up in one call.

The model is not wrapped: parameters are replaced while it trains. What allocates sees the gradients of the whole batch,
which are the same bits in every process, so that all of them choose the same.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dora_cli.models.quantised import plain_tensors
from dora_cli.processes import World

if TYPE_CHECKING:
    from dora_cli.training.setup import Session

SAMPLED = 64  # numbers of a weight that are compared between processes


def add_up(world: World, parameters: Iterable[nn.Parameter], others: Sequence[Tensor]) -> None:
    """Make gradients, and ``others`` in place, the sums over processes, in one flat all-reduce.

    Args:
        parameters: the same in every process. One that has a gradient in some process gets the sum; one that has none
            in any keeps none.
        others: float32 tensors on the parameters' device.
    """
    if world.alone:
        return
    training = [p for p in parameters if p.requires_grad]
    missing = [i for i, p in enumerate(training) if p.grad is None]
    device = others[0].device
    found = torch.ones(len(training), device=device)
    if missing:
        found[torch.tensor(missing, device=device)] = 0.0
    parts = [found, *(p.new_zeros(p.shape) if p.grad is None else p.grad for p in training), *others]
    flat = torch.cat([part.flatten() for part in parts])
    world.add_up(flat)
    sums = [total.view(part.shape) for total, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
    if missing:  # only then does the host look
        anywhere = sums[0].tolist()
        missing = [i for i in missing if anywhere[i] == 0]
    for parameter, total in zip(training, sums[1:], strict=False):
        parameter.grad = total
    for i in missing:
        training[i].grad = None
    for tensor, total in zip(others, sums[1 + len(training) :], strict=True):
        tensor.copy_(total)


class OwnRandom:
    """Random numbers of the forward pass (dropout), which differ between processes; all others are the same in each.

    Args:
        seed: of this process.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        self.state = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if self.device.type == "cuda":
            self.state["cuda"] = torch.Generator(self.device).manual_seed(seed).get_state()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Within, this process's own; then the shared ones stand where they stood."""
        shared = self._read()
        self._write(self.state)
        try:
            yield
        finally:
            self.state = self._read()
            self._write(shared)

    def _read(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _write(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def restore(self, saved: Sequence[dict[str, Tensor]], world: World, step: int) -> None:
        """Go on as each process did at ``step``; anew where there were another number of them."""
        if len(saved) == world.size and saved[world.rank].keys() == self.state.keys():
            self.state = dict(saved[world.rank])
        else:
            self.reseed(world.seed(step))


def agree(session: "Session") -> None:
    """Refuse to train what is not the same in every process: rows and weights may lie on other disks.

    Raises:
        UserError: in the main process; the others end with it.
    """
    world = session.world
    if world.alone:
        return
    held = f"{session.device.type}, sharded: {session.sharded}, with weights: {not session.hollow}"
    world.agree("the device and how the base is held", held, "set train.device, and train.shard=none or full")
    rows = {role: encoded.fingerprint() for role, encoded in session.encoded.items()}
    world.agree("the data", json.dumps(rows), "give every machine the same files")
    world.agree("the base model's weights, or where to adapt them", session.origin, "give every machine the same files")


def sample(model: nn.Module) -> str:
    """A digest of the names, shapes and a few numbers of each weight: other weights have another."""
    digest = sha256()
    for name, tensor in model.state_dict().items():
        for plain in plain_tensors(tensor):
            flat = plain.detach().reshape(-1)
            few = flat[:: max(1, len(flat) // SAMPLED)].double().cpu()
            digest.update(f"{name} {tuple(plain.shape)} ".encode() + few.numpy().tobytes())
    return digest.hexdigest()
