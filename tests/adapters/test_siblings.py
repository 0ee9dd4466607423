"""Layers computed as one node against the same layers alone: values, gradients, and when they stay alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_cli.adapters import siblings
from dora_cli.adapters.components import Components
from dora_cli.adapters.gated import Gated
from dora_cli.adapters.inject import inject
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.mora import Mora
from dora_cli.adapters.resize import resize
from dora_cli.adapters.siblings import join
from dora_cli.modes import rehearsing

D = 24


class Attention(nn.Module):
    """q, k, v of one input, and o. v's is wider, k has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, 2 * D)
        self.o_proj = nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        gate = torch.sigmoid(self.q_proj(x) * self.k_proj(x)).repeat(1, 1, 2)
        out: Tensor = self.o_proj(gate * self.v_proj(x))
        return out


NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANKS = [5, 17, 1, 3]


def made(part: Any = None, *, joined: bool = True, kind: type = Attention) -> tuple[nn.Module, dict[str, Any]]:
    """The same adapted model every time, its layers joined or not."""
    torch.manual_seed(0)
    model: nn.Module = kind().requires_grad_(False)
    part = part or Components()
    layers: dict[str, Any] = inject(model, NAMES, part, RANKS)
    model.double()
    for layer in layers.values():
        for name in "abc":
            if hasattr(layer, name):
                nn.init.normal_(getattr(layer, name))
        if isinstance(part, Gated):
            layer.settle()  # nothing is drawn
    part.masks(layers, 2)
    if joined:
        join(layers, lambda: model(torch.randn(2, 3, D).double()))
    return model, layers


def inputs() -> Tensor:
    return torch.randn(4, 5, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_(True)


def outcome(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    """Output and every gradient."""
    x = inputs() if x is None else x
    model.zero_grad()
    y = model(x)
    (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=1e-9, atol=1e-9) for n in one)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each node computed, as they come."""
    found: list[int] = []
    real = siblings.low_rank_linears

    def noted(x: Tensor, layers: Any, *rest: Any) -> list[Tensor]:
        found.append(len(layers))
        return real(x, layers, *rest)

    monkeypatch.setattr(siblings, "low_rank_linears", noted)
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("part", [Components, Lora, Gated])
def test_joined_or_alone_they_compute_the_same(part: Any, dropout: float, nodes: list[int]) -> None:
    joined, alone = made(part(dropout=dropout))[0], made(part(dropout=dropout), joined=False)[0]
    nodes.clear()
    first = outcome(joined)
    assert nodes == [3, 1]
    assert same(first, outcome(alone))
    assert nodes[2:] == [1, 1, 1, 1]
    assert len(first) == 2 + 4 * len([n for n in first if n.startswith("q_proj.")])
    assert all(first[f"{name}.a"].abs().max() > 0 for name in NAMES)


def test_gradients_are_those_of_finite_differences() -> None:
    model, layers = made(Components())
    factors = [getattr(layer, n) for layer in layers.values() for n in "abc"]
    names = [f"{m}.{n}" for m in layers for n in "abc"]
    x = inputs()[:1, :2].detach().requires_grad_(True)

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        values: Tensor = torch.func.functional_call(model, dict(zip(names, factors, strict=True)), (x,))
        return values

    assert torch.autograd.gradcheck(run, (x, *factors))


def test_what_needs_no_gradient_gets_none(nodes: list[int]) -> None:
    results = []
    for joined in (True, False):
        model, layers = made(joined=joined)
        layers["q_proj"].a.requires_grad_(False)
        layers["k_proj"].b.requires_grad_(False)
        layers["v_proj"].c.requires_grad_(False)
        results.append(outcome(model))
    assert {"q_proj.a", "k_proj.b", "v_proj.c"}.isdisjoint(results[0])
    assert same(*results)


def test_an_output_that_nobody_uses_has_no_gradient() -> None:
    results = []
    for joined in (True, False):
        _, layers = made(joined=joined)
        x = inputs()
        q, k, v = (layers[name](x) for name in NAMES[:3])
        (q.sum() + 2 * v.square().sum()).backward()
        assert k.requires_grad
        grads = {
            n: p.grad for m in ("q_proj", "v_proj") for n, p in layers[m].named_parameters(m) if p.grad is not None
        }
        assert layers["k_proj"].a.grad is None or not layers["k_proj"].a.grad.any()
        results.append(grads | {"x": x.grad})
    assert same(*results)  # type: ignore[arg-type]


def test_whoever_cannot_take_part_is_computed_alone(nodes: list[int]) -> None:
    """Nothing left, switched off, a base that somebody listens to: of the first, and of one in the middle."""

    def empty(layer: Any) -> None:
        resize(layer, torch.tensor([], dtype=torch.long))

    def off(layer: Any) -> None:
        layer.active = False

    def heard(layer: Any) -> None:
        layer.base_layer.register_forward_hook(lambda *_: None)

    for change in (empty, off, heard):
        for name, expected in (("q_proj", [2, 1]), ("k_proj", [2, 1])):
            results = []
            for joined in (True, False):
                model, layers = made(joined=joined)
                change(layers[name])
                nodes.clear()
                results.append(outcome(model))
                if joined:
                    assert nodes == expected
            assert same(*results)


def test_another_input_is_computed_anew(nodes: list[int]) -> None:
    _, layers = made()
    alone = made(joined=False)[1]
    q, k, v = (layers[name] for name in NAMES[:3])
    x, other = inputs().detach(), torch.randn(4, 5, D, dtype=torch.float64)
    with torch.no_grad():
        nodes.clear()
        q(x)
        assert torch.allclose(k(other), alone["k_proj"](other))  # not what waits
        assert torch.allclose(v(other), alone["v_proj"](other))
        q(x)
        x.mul_(2)  # the same tensor, other values
        assert torch.allclose(k(x), alone["k_proj"](x))
        q(x)
    assert k(x).requires_grad  # what waits has no graph
    q(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert k(x).dtype == torch.bfloat16
    assert torch.allclose(q(x), alone["q_proj"](x))  # once more, before the others were asked
    assert [n for n in nodes if n > 1] == [3, 2, 3, 2, 3, 2, 3, 2, 3]


def test_written_parameters_are_read_in_the_next_pass() -> None:
    model, layers = made()
    x = inputs().detach()
    with torch.no_grad():
        before = model(x)
        layers["v_proj"].c.zero_()
        layers["k_proj"].c.zero_()
        after = model(x)
        assert not torch.allclose(before, after)
        alone, others = made(joined=False)
        others["v_proj"].c.zero_()
        others["k_proj"].c.zero_()
        assert torch.allclose(after, alone(x))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(dropout: float, reentrant: bool, nodes: list[int]) -> None:
    model, _ = made(Components(dropout=dropout))
    first = outcome(model)
    nodes.clear()
    x = inputs()
    model.zero_grad()
    y = checkpoint(model, x, use_reentrant=reentrant)
    (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
    found = {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert nodes == [3, 1, 3, 1]
    assert first.keys() == found.keys()
    assert all(torch.equal(first[n], found[n]) for n in first)


def test_evaluation_in_inference_mode() -> None:
    model, x = made()[0], inputs().detach()
    with torch.inference_mode():
        assert torch.allclose(model(x), made(joined=False)[0](x))


def test_a_copy_of_the_model_is_joined_with_itself(nodes: list[int]) -> None:
    model, layers = made()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in NAMES:
            getattr(twin, name).c.zero_()
    nodes.clear()
    x = inputs().detach()
    assert torch.allclose(twin(x), Attention.forward(_bare(twin), x))
    assert nodes == [3, 1]
    assert twin.q_proj.siblings is not layers["q_proj"].siblings


def _bare(model: Any) -> Any:
    bare = Attention().double()
    for name in NAMES:
        setattr(bare, name, getattr(model, name).base_layer)
    return bare


def test_they_keep_one_input_between_them() -> None:
    def kept(*, joined: bool) -> int:
        model, layers = made(Components(dropout=0.3), joined=joined)
        storages = {}
        parameters = {p.data_ptr() for p in model.parameters()}

        def note(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = inputs()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            outs = [layers[name](x) for name in NAMES[:3]]
        assert len(outs) == 3
        return sum(storages.values())

    assert kept(joined=True) == kept(joined=False)


def test_a_pass_that_ends_early_leaves_nothing_once_it_is_forgotten() -> None:
    _, layers = made()
    x = inputs()
    layers["q_proj"](x)
    group = layers["q_proj"].siblings
    assert group._input is x and len(group._waiting) == 2
    group.forget()
    assert group._input is None and not group._waiting
    for name in NAMES[:3]:
        layers[name](x)
    assert group._input is None and not group._waiting  # nothing is held beyond the pass


class Dropping(Attention):
    """Drops before each of them: in training their inputs differ."""

    def forward(self, x: Tensor) -> Tensor:
        def drop(x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, self.training)

        gate = torch.sigmoid(self.q_proj(drop(x)) * self.k_proj(drop(x))).repeat(1, 1, 2)
        out: Tensor = self.o_proj(gate * self.v_proj(drop(x)))
        return out


def test_a_rehearsal_shows_what_evaluation_does_not_and_leaves_no_trace() -> None:
    model, layers = made(joined=False, kind=Dropping)
    model.register_buffer("seen", torch.zeros(1))
    model.register_forward_hook(lambda *_: model.seen.add_(1))
    model.eval()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    assert len(join(layers, lambda: model(x))) == 1
    layers = made(joined=False, kind=Dropping)[1]
    before = torch.get_rng_state()
    with rehearsing(model), torch.no_grad():
        assert model.training
        assert join(layers, lambda: model(x)) == {}
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert float(model.seen) == 1


class Relative(Attention):
    """Calls k once more, with something else, as DeBERTa does."""

    def forward(self, x: Tensor) -> Tensor:
        other = torch.zeros(1, 1, D, dtype=x.dtype)
        return super().forward(x) + self.k_proj(other)


class Cross(Attention):
    def forward(self, x: Tensor) -> Tensor:
        memory = x.flip(0)
        gate = torch.sigmoid(self.q_proj(x) * self.k_proj(memory)).repeat(1, 1, 2)
        out: Tensor = self.o_proj(gate * self.v_proj(memory))
        return out


class Written(Attention):
    """Writes into the input between two of them."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        k, v = self.k_proj(x), self.v_proj(x)
        with torch.no_grad():
            x *= 2
        out: Tensor = self.o_proj(torch.sigmoid(self.q_proj(x) * k).repeat(1, 1, 2) * v)
        return out


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Attention, [["q_proj", "k_proj", "v_proj"]]),
        (Relative, []),
        (Cross, [["k_proj", "v_proj"]]),
        (Written, [["k_proj", "v_proj"]]),
    ],
)
def test_those_are_joined_that_are_always_called_in_turn(kind: Any, expected: list[list[str]]) -> None:
    model, layers = made(joined=False, kind=kind)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    assert [list(names) for names in join(layers, lambda: model(x))] == expected
    assert [n for n in NAMES if layers[n].siblings is None] == [
        n for n in NAMES if [n] != [m for group in expected for m in group if m == n]
    ]
    alone = made(joined=False, kind=kind)[0]
    assert torch.allclose(model(x), alone(x))


def test_modules_of_two_parents_stay_apart() -> None:
    """With activations recomputed block by block, one block would otherwise hold another's."""
    blocks = nn.ModuleList([nn.ModuleDict({n: nn.Linear(D, D) for n in ("k", "v")}) for _ in range(2)])
    blocks.requires_grad_(False)
    layers: Any = inject(blocks, ["0.k", "0.v", "1.k", "1.v"], Components(), [2] * 4)
    x = torch.randn(3, D)
    found = join(layers, lambda: [layer(x) for layer in layers.values()])
    assert list(found) == [("0.k", "0.v"), ("1.k", "1.v")]


def test_masks_of_their_own_and_updates_of_another_kind_stay_alone() -> None:
    assert all(layer.siblings is None for layer in made(Components(dropout=0.1, shared_dropout=False))[1].values())
    model = Attention().requires_grad_(False)
    layers: Any = inject(model, NAMES, Mora(), [2] * 4)
    assert join(layers, lambda: pytest.fail("nothing to find out")) == {}
