"""The fused node against the plain operations: values, gradients, what it keeps, and when it stands back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dora_cli.adapters import base as base_module
from dora_cli.adapters.base import LowRankLayer
from dora_cli.adapters.components import Components
from dora_cli.adapters.dropout import attach
from dora_cli.adapters.fused import can_fuse
from dora_cli.adapters.gated import Gated
from dora_cli.adapters.lora import Lora, LoraLayer

D_IN, D_OUT = 24, 40


def made(part: Any, rank: int, base: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> LowRankLayer:
    torch.manual_seed(0)
    base = (base or nn.Linear(D_IN, D_OUT)).to(dtype).requires_grad_(False)
    layer: LowRankLayer = part.layer(base, rank).to(dtype)
    with torch.no_grad():
        for name in ("a", "b", "c"):
            if name in layer.unit_axes:
                getattr(layer, name).normal_()
    return layer


def outcome(layer: LowRankLayer, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and every gradient."""
    x = x.detach().requires_grad_(True)
    layer.zero_grad()
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    return found | {n: p.grad.clone() for n, p in layer.adapter_parameters().items() if p.grad is not None}


def plainly(monkeypatch: pytest.MonkeyPatch, layer: LowRankLayer, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(base_module, "can_fuse", lambda *_: False)
        return outcome(layer, x, grad)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 7, 15, 16, 17, 33])
@pytest.mark.parametrize("part", [Components, Lora, Gated])
def test_output_and_gradients_are_those_of_the_plain_operations(
    part: Any, rank: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = made(part(dropout=dropout), rank)
    if part is Gated:
        layer.settle()  # nothing is drawn
    attach({"layer.q": layer}, dropout, seed=2, shared=True)
    x, grad = torch.randn(3, 5, D_IN).double(), torch.randn(3, 5, D_OUT).double()
    fused, plain = outcome(layer, x, grad), plainly(monkeypatch, layer, x, grad)
    assert fused.keys() == plain.keys() >= {"y", "x", "a", "b"}
    for name in plain:
        assert torch.allclose(fused[name], plain[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize(
    "base",
    [nn.Linear(D_IN, D_OUT, bias=False), Conv1D(D_OUT, D_IN), nn.Linear(D_IN, D_IN)],
    ids=["no bias", "conv", "sq"],
)
def test_every_kind_of_base_layer(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(Components(), 5, base)
    x, grad = torch.randn(7, D_IN).double(), torch.randn(7, layer.d_out).double()
    assert can_fuse(base, x, layer.a)
    fused, plain = outcome(layer, x, grad), plainly(monkeypatch, layer, x, grad)
    for name in plain:
        assert torch.allclose(fused[name], plain[name], rtol=1e-9, atol=1e-9), name


def test_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(Components(), 5)
    x = torch.randn(D_IN, 4, 3).double().permute(2, 1, 0)
    grad = torch.randn(1, 1, D_OUT).double().expand(3, 4, D_OUT)
    assert not x.is_contiguous()
    fused, plain = outcome(layer, x, grad), plainly(monkeypatch, layer, x, grad)
    for name in plain:
        assert torch.allclose(fused[name], plain[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(dropout: float) -> None:
    layer = made(Components(dropout=dropout), 3)
    masks = attach({"layer.q": layer}, dropout, seed=2, shared=True)
    x = torch.randn(4, D_IN, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        if masks is not None:
            masks.move(1, 0)  # finite differences write into x behind its version's back
        values: Tensor = torch.func.functional_call(layer, dict(zip("abc", factors, strict=True)), (x,))
        return values

    assert torch.autograd.gradcheck(run, (x, layer.a, layer.b, layer.c))


def test_what_needs_no_gradient_gets_none() -> None:
    layer = made(Components(), 3)
    layer.b.requires_grad_(False)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.a.grad is not None
    assert layer.c.grad is not None
    assert layer.b.grad is None
    assert x.grad is None


def kept_bytes(run: Any, *layers: nn.Module) -> int:
    """Bytes kept for backward, the layers' parameters aside, each storage once."""
    storages: dict[int, int] = {}
    parameters = {p.data_ptr() for layer in layers for p in layer.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = run()
    assert out.requires_grad
    return sum(storages.values())


THIN = 16 * (D_IN + D_OUT) + 7  # the factors of 7 components in 16 columns, and what each is multiplied by


def test_only_the_input_and_what_is_r_wide_is_kept() -> None:
    layer = made(Components(), 7)
    x = torch.randn(100, D_IN, dtype=torch.float64, requires_grad=True)
    assert kept_bytes(lambda: layer(x), layer) == (100 * (D_IN + 16) + THIN) * 8


def test_siblings_keep_one_dropped_input_between_them() -> None:
    layers = {name: made(Components(dropout=0.1), 7) for name in ("l.q", "l.k", "l.v")}
    x = torch.randn(100, D_IN, dtype=torch.float64, requires_grad=True)
    hidden = 3 * (100 * 16 + THIN) * 8
    for shared, copies in ((True, 1), (False, 3)):
        attach(layers, 0.1, seed=1, shared=shared)
        kept = kept_bytes(lambda: sum(layer(x) for layer in layers.values()), *layers.values())
        assert kept == hidden + copies * 100 * D_IN * 8


def test_under_autocast_it_computes_in_bfloat16_like_the_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(Components(), 6, dtype=torch.float32)
    x, grad = torch.randn(9, D_IN), torch.randn(9, D_OUT).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, plain = outcome(layer, x, grad), plainly(monkeypatch, layer, x, grad)
    exact = plainly(monkeypatch, layer, x, grad.float())
    assert fused["y"].dtype == torch.bfloat16
    for name in exact:
        assert fused[name].dtype == plain[name].dtype
        error, rounding = (fused[name] - exact[name]).norm(), (plain[name] - exact[name]).norm()
        assert error <= 1.2 * rounding + 1e-6, name  # no less exact than what it replaces


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients(dropout: float) -> None:
    layer = made(Components(dropout=dropout), 5)
    attach({"l.q": layer}, dropout, seed=1, shared=True)
    x, grad = torch.randn(6, D_IN).double(), torch.randn(6, D_OUT).double()
    first = outcome(layer, x, grad)
    x = x.requires_grad_(True)
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).backward(grad)
    assert torch.equal(x.grad, first["x"])  # type: ignore[arg-type]
    assert all(torch.equal(getattr(layer, n).grad, first[n]) for n in "abc")


class Doubled(nn.Linear):
    """Twice a linear layer, whatever it is called."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_later_modules_may_write_into_its_output() -> None:
    layer = made(Components(), 5)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = torch.autograd.grad((layer(x) / 2).relu().sum(), layer.a)[0]
    y /= 2
    assert torch.allclose(torch.autograd.grad(nn.functional.relu_(y).sum(), layer.a)[0], expected)


class Slower(LoraLayer):
    """An update of its own."""

    def update(self, x: Tensor) -> Tensor:
        return 3 * super().update(x)


def test_a_layer_with_an_update_of_its_own_is_heard() -> None:
    base = nn.Linear(D_IN, D_OUT).requires_grad_(False)
    a, b = torch.randn(4, D_IN), torch.randn(D_OUT, 4)
    layer, x = Slower(base, a, b, None, 1.0, 0.0), torch.randn(5, D_IN)
    assert torch.allclose(layer(x), base(x) + 3 * x @ layer.delta_weight().T, atol=1e-3)


def test_it_stands_back_where_the_base_is_more_than_a_frozen_linear_layer() -> None:
    x = torch.randn(2, D_IN)
    a = torch.zeros(3, D_IN)

    def frozen() -> nn.Linear:
        return nn.Linear(D_IN, D_OUT).requires_grad_(False)

    assert can_fuse(frozen(), x, a)
    assert not can_fuse(nn.Linear(D_IN, D_OUT), x, a)  # it trains
    assert not can_fuse(Doubled(D_IN, D_OUT).requires_grad_(False), x, a)
    assert not can_fuse(frozen().bfloat16(), x, a)
    assert not can_fuse(frozen().bfloat16(), x.bfloat16(), a)  # the update is computed in the adapter's precision
    watched, patched = frozen(), frozen()
    watched.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert not can_fuse(watched, x, a)
    Doubled.__name__ = "Linear"
    assert not can_fuse(Doubled(D_IN, D_OUT).requires_grad_(False), x, a)
    listened = frozen()
    listened.register_full_backward_pre_hook(lambda *_: None)
    assert not can_fuse(listened, x, a)
    assert not can_fuse(patched, x, a)


def test_a_bfloat16_base_under_a_float32_adapter_is_right() -> None:
    layer = Components().layer(nn.Linear(D_IN, D_OUT).bfloat16().requires_grad_(False), 4)
    nn.init.normal_(layer.c)
    x = torch.randn(3, D_IN).bfloat16()
    expected = layer.base_layer(x).float() + x.float() @ layer.delta_weight().T
    assert torch.allclose(layer(x).float(), expected, rtol=2e-2, atol=5e-2)


def test_compiled_the_graph_is_whole_and_a_compaction_costs_one_recompilation() -> None:
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    from dora_cli.adapters.inject import inject
    from dora_cli.adapters.resize import resize

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 12)).requires_grad_(False)
    part = Components(dropout=0.1)
    layers = inject(model, ["0", "2", "3"], part, [6, 6, 6])
    part.masks(layers, 1)
    for layer in layers.values():
        nn.init.normal_(layer.c)
    count = CompileCounter()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    x = torch.randn(5, 12)
    for _ in range(3):
        compiled(x).sum().backward()
    assert count.frame_count == 1
    for keep, layer in zip(([0, 2], [1, 3, 4], [5]), layers.values(), strict=True):
        resize(layer, torch.tensor(keep))
    for _ in range(3):
        compiled(x).sum().backward()
    assert count.frame_count == 2
    model.eval()
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
