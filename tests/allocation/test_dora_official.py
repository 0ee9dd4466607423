"""``dora_official`` beside an independent, naive reading of METHODS 2.7, for 200 steps."""

import math

import torch
from torch import nn

from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import inject, parameter_groups
from dora_cli.allocation.allocators.prune_official import PruneOfficial
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.component_norm import ComponentNorm
from dora_cli.allocation.regularizers.dem import Dem
from dora_cli.allocation.schedules import CubicLate

L, WIDTH, START, FINAL, T, INTERVAL, ETA, LR = 5, 24, 6, 4, 200, 10, 0.5, 5e-3


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    modules: list[nn.Module] = []
    for _ in range(L):
        modules += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    model = nn.Sequential(*modules).double()
    g = torch.Generator().manual_seed(2)
    x = torch.randn(T, 16, WIDTH, generator=g).double()
    y = torch.tanh(x @ torch.randn(WIDTH, WIDTH, generator=g).double() * 0.5)
    return model, x, y


class NaiveLayer(nn.Module):
    """Eq. 6 as it stands, every rank-1 matrix formed."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.c = nn.Parameter(torch.zeros(len(a), dtype=a.dtype))

    def pieces(self) -> torch.Tensor:
        return torch.stack([self.c[i] * torch.outer(self.b[:, i], self.a[i]) for i in range(len(self.c))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ (8 / START * self.pieces().sum(0)).T


def naive(start: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> list[list[float]]:
    """METHODS 2.7, line by line. Returns every c after every step."""
    model, xs, ys = problem()
    model.requires_grad_(False)
    layers = []
    for name, (a, b) in start.items():
        layer = NaiveLayer(model[int(name)], a, b)  # type: ignore[index, arg-type]
        model[int(name)] = layer  # type: ignore[index]
        layers.append(layer)
    parameters = [p for layer in layers for p in (layer.a, layer.b, layer.c)]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    t_i, t_e, n = 0.15 * T, 0.5 * T, L * START
    ema = [torch.zeros(START, dtype=torch.float64) for _ in layers]
    final: torch.Tensor | None = None
    history = []
    for t in range(1, T + 1):
        loss = (model(xs[t - 1]) - ys[t - 1]).square().mean()
        if t <= t_e:
            dem = sum(layer.a[i].var() + layer.b[:, i].var() for layer in layers for i in range(START))
            loss = loss + ETA * dem / (2 * L * START)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if t <= t_e:
                for m, layer in enumerate(layers):
                    pieces = layer.pieces()
                    norms = torch.stack([p.norm() for p in pieces])
                    ema[m] = 0.9 * ema[m] + 0.1 * norms / (pieces.sum(0).norm() + 1e-8)
            last = t == math.floor(t_e)
            if t_i <= t <= t_e and (math.floor(t - t_i) % INTERVAL == 0 or last):
                x = (t - t_i) / (t_e - t_i)
                pruned = max(int(n * ((START - FINAL) / START) * x**3), 1)
                scores = torch.cat(ema)
                keep = scores > scores.sort().values[pruned - 1]
                for m, layer in enumerate(layers):
                    layer.c[~keep[m * START : (m + 1) * START]] = 0
                if last:
                    final = keep
            if final is not None:
                for m, layer in enumerate(layers):
                    layer.c[~final[m * START : (m + 1) * START]] = 0
        history.append(torch.cat([layer.c for layer in layers]).tolist())
    return history


def ours() -> tuple[list[list[float]], dict[str, tuple[torch.Tensor, torch.Tensor]], Allocation]:
    model, xs, ys = problem()
    model.requires_grad_(False)
    layers = inject(model, [str(2 * i) for i in range(L)], Components(alpha=8.0, decay_gates=True), [START] * L)
    model.double()
    start = {name: (layer.a.detach().clone(), layer.b.detach().clone()) for name, layer in layers.items()}  # type: ignore[union-attr]
    allocation = Allocation(
        layers,
        schedule=CubicLate(start=0.15, end=0.5),
        importance=ComponentNorm(beta=0.9),
        allocator=PruneOfficial(interval=INTERVAL),
        regularizer=Dem(weight=ETA),
        total_steps=T,
        target=Target(L * FINAL, by_cost=False),
    )
    allocation.importance.smoothed = allocation.importance.smoothed.double()  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(parameter_groups(layers, lr=LR, weight_decay=0.01))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    history = []
    for t in range(1, T + 1):
        (model(xs[t - 1]) - ys[t - 1]).square().mean().backward()
        allocation.after_backward(t)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        allocation.after_step(t, optimizer)
        optimizer.zero_grad()
        history.append(torch.cat([layer.c for layer in layers.values()]).tolist())  # type: ignore[misc]
    return history, start, allocation


def test_two_hundred_steps_equal_the_naive_reading() -> None:
    history, start, allocation = ours()
    reference = naive(start)
    for t, (mine, theirs) in enumerate(zip(history, reference, strict=True), start=1):
        assert [v == 0 for v in mine] == [v == 0 for v in theirs], f"different components are closed at step {t}"
        difference = max(abs(m - n) for m, n in zip(mine, theirs, strict=True))
        assert difference < 1e-9, f"step {t}: gates differ by {difference}"
    assert allocation.alive_count() == L * FINAL
    ranks = list(allocation.table.ranks().values())
    assert len(set(ranks)) > 1, "the problem is too easy: every module kept as many"


def test_every_event_prunes_at_least_one_and_events_may_come_a_step_early() -> None:
    window = CubicLate(start=0.15, end=0.5).window(30)  # start 4.5, end 15
    allocator = PruneOfficial(interval=3)
    assert [t for t in range(1, 31) if allocator.is_event(t, window)] == [4, 5, 8, 11, 14, 15]
