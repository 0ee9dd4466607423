"""Turning an update into its principal components: against torch's SVD, autograd and Adam itself."""

import pytest
import torch
from torch import Tensor, nn

from dora_cli.adapters.lora import LoraLayer
from dora_cli.adapters.principal import principal_turn, turn_to_principal

D_OUT, D_IN, RANK = 9, 7, 4


def layer(seed: int = 0, rank: int = RANK, scale: float = 0.5) -> LoraLayer:
    torch.manual_seed(seed)
    return LoraLayer(nn.Linear(D_IN, D_OUT), torch.randn(rank, D_IN), torch.randn(D_OUT, rank), None, scale, 0.0)


def whole(*layers: LoraLayer) -> list[tuple[LoraLayer, Tensor]]:
    """All components of each."""
    return [(one, torch.arange(one.rank)) for one in layers]


def gradients(a: Tensor, b: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of ½‖B A − target‖² with respect to A and B."""
    error = b @ a - target
    return b.T @ error, error @ a.T


def test_the_update_stays_and_its_components_are_those_of_the_svd() -> None:
    one, two = layer(1), layer(2)
    before = [x.delta_weight() for x in (one, two)]
    lengths = [float(x.a.detach().square().sum(1).mean().sqrt()) for x in (one, two)]
    turn_to_principal(whole(one, two), None)
    for turned, update, length in zip((one, two), before, lengths, strict=True):
        a, b = turned.a.detach(), turned.b.detach()
        assert torch.allclose(turned.delta_weight(), update, atol=1e-5)
        assert torch.allclose(a @ a.T, length**2 * torch.eye(RANK), atol=1e-4)
        sizes = turned.scale * b.norm(dim=0) * length
        assert torch.allclose(sizes, torch.linalg.svdvals(update)[:RANK], rtol=1e-4)  # the largest first


def test_first_moments_are_those_that_gradients_of_the_new_factors_would_have_left() -> None:
    turned = layer()
    optimizer = torch.optim.AdamW(turned.parameters())
    target = torch.randn(D_OUT, D_IN)
    a, b = turned.a.detach().clone(), turned.b.detach().clone()
    grad_a, grad_b = gradients(a, b, target)
    for parameter, gradient in ((turned.a, grad_a), (turned.b, grad_b)):
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": gradient.clone(),
            "exp_avg_sq": gradient.square(),
        }
    turn_to_principal(whole(turned), optimizer)
    new_a, new_b = gradients(turned.a.detach(), turned.b.detach(), target)
    assert torch.allclose(optimizer.state[turned.a]["exp_avg"], new_a, atol=1e-4)
    assert torch.allclose(optimizer.state[turned.b]["exp_avg"], new_b, atol=1e-4)
    assert float(optimizer.state[turned.a]["step"]) == 3.0


def test_second_moments_are_exact_for_gradients_that_are_uncorrelated() -> None:
    turned, n = layer(), 40_000
    optimizer = torch.optim.AdamW(turned.parameters())
    spread = torch.rand(RANK, D_IN) + 0.5
    draws = torch.randn(n, RANK, D_IN) * spread  # of A's gradient
    m = principal_turn(turned.a.detach()[None], turned.b.detach()[None])[0]
    optimizer.state[turned.a] = {"exp_avg": torch.zeros(RANK, D_IN), "exp_avg_sq": spread.square()}
    turn_to_principal(whole(turned), optimizer)
    seen = (torch.linalg.inv(m).T.float() @ draws).square().mean(0)
    assert torch.allclose(optimizer.state[turned.a]["exp_avg_sq"], seen, rtol=0.06)


def test_only_the_components_that_are_named_turn() -> None:
    """What is dropped stays where it is, in the middle too; others would lose what landed there."""
    turned, places = layer(), torch.tensor([0, 2])
    others = torch.tensor([1, 3])
    optimizer = torch.optim.SGD([turned.a, turned.b], lr=0.0, momentum=0.9)
    moments = [torch.randn_like(p) for p in (turned.a, turned.b)]
    optimizer.state |= {p: {"momentum_buffer": m.clone()} for p, m in zip((turned.a, turned.b), moments, strict=True)}
    a, b = turned.a.detach().clone(), turned.b.detach().clone()
    m = principal_turn(a[places][None], b[:, places][None])[0].float()
    turn_to_principal([(turned, places)], optimizer)
    assert torch.equal(turned.a[others], a[others]) and torch.equal(turned.b[:, others], b[:, others])
    assert torch.allclose(turned.b[:, places] @ turned.a[places], b[:, places] @ a[places], atol=1e-5)
    assert float((turned.a.detach()[0] @ turned.a.detach()[2]).abs()) < 1e-5
    buffers = [optimizer.state[p]["momentum_buffer"] for p in (turned.a, turned.b)]
    assert torch.allclose(buffers[0][places], torch.linalg.inv(m).T @ moments[0][places], atol=1e-5)
    assert torch.allclose(buffers[1][:, places], moments[1][:, places] @ m.T, atol=1e-5)
    assert torch.equal(buffers[0][others], moments[0][others])


def test_turning_twice_changes_nothing_more() -> None:
    turned = layer()
    turn_to_principal(whole(turned), None)
    a, b = turned.a.detach().clone(), turned.b.detach().clone()
    turn_to_principal(whole(turned), None)
    signs = (turned.a.detach() * a).sum(1).sign()
    assert torch.allclose(turned.a.detach() * signs[:, None], a, atol=1e-4)
    assert torch.allclose(turned.b.detach() * signs, b, atol=1e-4)


@pytest.mark.parametrize("case", ["untrained", "dependent", "wide"])
def test_what_has_no_such_basis_is_left_to_the_bit(case: str) -> None:
    left = layer(rank=D_IN + 1 if case == "wide" else RANK)
    with torch.no_grad():
        if case == "untrained":
            left.b.zero_()
        if case == "dependent":
            left.a[1] = left.a[0]
    a, b, other = left.a.detach().clone(), left.b.detach().clone(), layer(5)
    turn_to_principal(whole(left, other), None)
    assert torch.equal(left.a, a) and torch.equal(left.b, b)
    assert not torch.equal(other.a, layer(5).a)  # its neighbour is turned all the same


def test_processes_turn_by_the_numbers_of_one_of_them() -> None:
    mine, told = layer(), []

    def agree(values: Tensor) -> Tensor:
        told.append(values)
        return torch.eye(RANK, dtype=torch.float64).flatten()  # the main process says: not at all

    a = mine.a.detach().clone()
    turn_to_principal(whole(mine), None, agree)
    assert torch.equal(mine.a, a) and told[0].dtype == torch.float64 and told[0].numel() == RANK**2
