"""EVA: running principal directions against exact ones, the sharing out of ranks, and what is looked at."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

from dora_cli.adapters.aflora import Aflora
from dora_cli.adapters.components import Components
from dora_cli.adapters.init.eva import Eva, RunningPca, leading, share_out
from dora_cli.adapters.inject import inject
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.svd import Svd
from dora_cli.adapters.weight_decomposed import WeightDecomposed

CPU = torch.device("cpu")


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """Principal directions (d, d) and shares of variance (d,), in float64."""
    x = x.double()
    _, sizes, right = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    return right, sizes**2 / (sizes**2).sum()


def rows_of(n: int, d: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    """(n, d) rows around a mean, with falling variance along random orthogonal directions."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g)).Q[: len(spectrum)]
    return torch.randn(n, len(spectrum), generator=g) * spectrum @ turn + torch.randn(d, generator=g) * 3


def running(x: Tensor, k: int, batch: int, tolerance: float = 0.99) -> RunningPca:
    pca = RunningPca(k, x.shape[1], tolerance, CPU)
    for part in x.split(batch):
        pca.update(part)
    return pca


def aligned(a: Tensor, b: Tensor) -> Tensor:
    """|cosine| of each row pair."""
    return (a.double() * b.double()).sum(dim=1).abs()


# ---- the running decomposition -------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 7, 50, 200])
def test_batches_give_the_principal_directions_of_all_rows(batch: int) -> None:
    """With k as wide as the space nothing is cut off, so batches of any size must come to the exact answer."""
    x = rows_of(200, 8, 0.7 ** torch.arange(8.0))
    x += torch.linspace(0, 5, 200)[:, None]  # the mean moves from batch to batch
    pca = running(x, 8, batch)
    directions, ratios = exact(x)
    assert torch.allclose(aligned(pca.directions, directions), torch.ones(8, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(pca.ratios(), ratios, atol=1e-5)
    assert torch.allclose(pca.directions @ pca.directions.T, torch.eye(8), atol=1e-5)


def test_a_few_directions_of_many_are_found_as_well() -> None:
    """Between kept and cut off there is a gap, so what is cut off per batch is noise."""
    spectrum = torch.cat([torch.tensor([8.0, 6.0, 4.0]), torch.full((37,), 0.05)])
    x = rows_of(400, 40, spectrum)
    pca = running(x, 3, 50)
    directions, ratios = exact(x)
    assert bool((aligned(pca.directions, directions[:3]) > 0.9999).all())
    assert torch.allclose(pca.ratios(), ratios[:3], rtol=1e-3)


def test_nothing_is_kept_of_the_rows() -> None:
    few, many = (running(rows_of(n, 12, 0.8 ** torch.arange(12.0)), 3, 20) for n in (40, 400))
    sizes = [sum(v.numel() for v in vars(pca).values() if isinstance(v, Tensor)) for pca in (few, many)]
    assert sizes[0] == sizes[1] == 3 * 12 + 12 + 3 + 3


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (200, 64)])
def test_leading_is_the_top_of_the_exact_decomposition(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape) @ torch.diag(0.8 ** torch.arange(float(shape[1])))
    sizes, right = leading(x, 5, torch.zeros(0, shape[1]))
    _, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    assert torch.allclose(sizes.double(), s[:5], rtol=1e-5)
    assert bool((aligned(right, v[:5]) > 1 - 1e-5).all())
    assert bool((right.gather(1, right.abs().argmax(dim=1, keepdim=True)) > 0).all())
    again = leading(x, 5, torch.zeros(0, shape[1]))
    assert torch.equal(right, again[1])


def test_rounding_is_no_direction() -> None:
    x = rows_of(50, 10, torch.tensor([3.0, 2.0, 1.0]))
    assert len(running(x, 8, 25).directions) == 3
    assert len(running(x[:2], 8, 25).directions) == 1  # two points span a line
    assert len(running(torch.ones(9, 10), 8, 3).directions) == 0
    assert running(torch.ones(9, 10), 8, 3).ratios().shape == (0,)


def test_directions_settle_one_by_one() -> None:
    pca = RunningPca(2, 3, 0.99, CPU)
    assert not pca.settled(1)
    pca.update(torch.tensor([[5.0, 0, 0], [-5, 0, 0], [0, 1, 0], [0, -1, 0]]))
    assert not pca.settled(1)  # nothing to compare with yet
    assert pca.settled(0)
    pca.update(torch.tensor([[5.0, 0, 0], [-5, 0, 0], [0, 0, 3], [0, 0, -3]]))
    assert pca.settled(1)
    assert not pca.settled(2)  # from the second axis to the third


# ---- ranks ---------------------------------------------------------------------------------------------------------
def test_ranks_go_to_the_largest_shares_and_the_total_stays() -> None:
    ratios = [torch.tensor([0.5, 0.4, 0.05, 0.01]), torch.tensor([0.3, 0.2, 0.02]), torch.tensor([0.04, 0.03])]
    assert share_out(ratios, [4, 4, 4], [1, 1, 1], 6) == [3, 2, 1]
    assert share_out(ratios, [4, 4, 4], [1, 1, 1], 4) == [2, 2, 0]
    assert share_out(ratios, [2, 2, 2], [1, 1, 1], 6) == [2, 2, 2]  # rho = 1 moves nothing
    # 10 + 10 + 2 + 2 fit in 29, the fifth (10) does not, and nothing after it is taken
    assert share_out(ratios, [4, 4, 4], [10, 2, 1], 29) == [2, 2, 0]


def test_ties_go_to_the_first_module_and_missing_directions_come_last() -> None:
    tie = torch.tensor([0.4, 0.1])
    assert share_out([tie, tie, tie], [2, 2, 2], [1, 1, 1], 4) == [2, 1, 1]
    assert share_out([torch.zeros(0), torch.tensor([0.3])], [2, 2], [1, 1], 3) == [2, 1]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_sharing_out_keeps_the_total_and_its_bounds(data: Any) -> None:
    n = data.draw(st.integers(1, 6))
    ranks = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    costs = data.draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    rho = data.draw(st.floats(1, 3))
    seed = data.draw(st.integers(0, 99))
    candidates = [round(rho * rank) for rank in ranks]
    g = torch.Generator().manual_seed(seed)
    found = [min(c, data.draw(st.integers(0, 5))) for c in candidates]
    ratios = [torch.rand(c, generator=g).sort(descending=True).values for c in found]
    moved = share_out(ratios, candidates, [1] * n, sum(ranks))
    assert sum(moved) == sum(ranks)
    assert all(m <= c for m, c in zip(moved, candidates, strict=True))
    limit = sum(r * c for r, c in zip(ranks, costs, strict=True))
    by_cost = share_out(ratios, candidates, costs, limit)
    assert sum(r * c for r, c in zip(by_cost, costs, strict=True)) <= limit


# ---- what is looked at ---------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """q and k read the same tensor, o another; ``idle`` is never called, ``table`` reads something that is no token."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(d, d), nn.Linear(d, d)
        self.o, self.idle, self.table = nn.Linear(d, 4), nn.Linear(d, d), nn.Linear(d, d)
        self.positions = torch.randn(1, 9, d)
        self.drop = nn.Dropout(0.5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.table(self.positions)
        out: Tensor = self.o(self.drop(torch.tanh(self.q(x) + self.k(x))))
        return out


NAMES = ["q", "k", "o"]


def batches_of(x: Tensor, mask: Tensor | None = None, n: int = 4) -> list[tuple[Tensor, Tensor]]:
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    return list(zip(x.split(n), mask.split(n), strict=True))


def passes(model: nn.Module, batches: Any) -> Iterator[tuple[Tensor, Callable[[], object]]]:
    for x, mask in batches:
        yield mask, partial(model, x)


@pytest.fixture
def model() -> Attention:
    torch.manual_seed(0)
    return Attention()


def sentences(n: int = 24, s: int = 5, d: int = 6, seed: int = 0) -> Tensor:
    return rows_of(n * s, d, 0.6 ** torch.arange(float(d)), seed).view(n, s, d)


def test_the_rows_are_the_principal_directions_of_each_modules_real_inputs(model: Attention) -> None:
    x = sentences()
    mask = torch.rand(24, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    eva = Eva(rho=2.0, tolerance=1.0)  # never settles: all data are read
    assert sum(eva.observe(model, NAMES, [3, 3, 3], [1, 1, 1], passes(model, batches_of(x, mask)))) == 9
    hidden = torch.tanh(model.q(x) + model.k(x))
    for name, inputs in (("q", x), ("k", x), ("o", hidden)):
        rows = eva.rows[name]
        assert bool((aligned(rows, exact(inputs[mask])[0][: len(rows)]) > 0.999).all()), name
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


def test_padding_is_left_out(model: Attention) -> None:
    x = sentences()
    mask = torch.arange(5)[None] < torch.arange(24)[:, None] % 4 + 1
    noisy = torch.where(mask[..., None], x, torch.randn_like(x) * 100)
    one, other = Eva(), Eva()
    one.observe(model, NAMES, [2, 2, 2], [1, 1, 1], passes(model, batches_of(x, mask)))
    other.observe(model, NAMES, [2, 2, 2], [1, 1, 1], passes(model, batches_of(noisy, mask)))
    for name in NAMES:
        assert torch.equal(one.rows[name], other.rows[name])


def test_modules_with_the_same_input_share_one_decomposition(model: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    real = RunningPca.update

    def counted(self: RunningPca, x: Tensor) -> None:
        updates.append(id(self))
        real(self, x)

    monkeypatch.setattr(RunningPca, "update", counted)
    eva = Eva(rho=1.0, tolerance=1.0)
    eva.observe(model, NAMES, [2, 3, 2], [1, 1, 1], passes(model, batches_of(sentences())))
    assert len(updates) == 2 * 6  # six batches: one for q and k, one for o
    assert len(set(updates)) == 2
    assert [len(eva.rows[name]) for name in NAMES] == [2, 3, 2]  # as wide as the wider of the two
    assert torch.equal(eva.rows["q"], eva.rows["k"][:2])


def test_a_module_that_sees_no_tokens_gets_no_rank(model: Attention) -> None:
    names = ["q", "idle", "table", "o"]
    ranks = Eva().observe(model, names, [2] * 4, [1] * 4, passes(model, batches_of(sentences())))
    assert ranks[1] == ranks[2] == 0
    assert sum(ranks) == 8


@pytest.mark.parametrize("flat", [False, True])
def test_inputs_may_be_one_row_an_example_or_one_a_position(flat: bool) -> None:
    """A pooler reads one row an example; some models flatten examples and positions into one axis."""
    x, mask = sentences(), torch.rand(24, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    linear = nn.Linear(6, 6)
    inputs = (lambda b: b.flatten(0, 1)) if flat else (lambda b: b[:, 0])
    stream = ((m, partial(linear, inputs(b))) for b, m in batches_of(x, mask))
    eva = Eva(tolerance=1.0)
    eva.observe(linear, [""], [3], [1], stream)
    seen = x[mask] if flat else x[:, 0]
    assert bool((aligned(eva.rows[""], exact(seen)[0][:3]) > 0.999).all())


def test_looking_ends_when_all_stands_still_or_with_the_data(model: Attention) -> None:
    read: list[int] = []

    def endless() -> Iterator[tuple[Tensor, Callable[[], object]]]:
        for i, batch in enumerate(cycle(batches_of(sentences()))):
            read.append(i)
            yield from passes(model, [batch])

    eva = Eva()
    eva.observe(model, NAMES, [2, 2, 2], [1, 1, 1], endless())
    assert 2 <= len(read) < 60
    assert "stood still" not in " ".join(eva.notes)
    eva = Eva(tolerance=1.0)
    eva.observe(model, NAMES, [2, 2, 2], [1, 1, 1], passes(model, batches_of(sentences())))
    assert "read 6 batches" in eva.notes[0]
    assert "the data ended before the directions of 3 modules stood still" in eva.notes[1]


@pytest.mark.parametrize("fails", [False, True])
def test_looking_leaves_no_trace(model: Attention, fails: bool) -> None:
    """Modes (a mixed lot), weights, hooks and random states are as before, even when a pass fails."""
    model.train()
    model.drop.eval()
    modes = [m.training for m in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state, stream = torch.get_rng_state(), passes(model, batches_of(sentences()))
    if fails:
        broken = islice(passes(model, [*batches_of(sentences()), (torch.ones(1, 1, 5), torch.ones(1, 1) > 0)]), 7)
        with pytest.raises(RuntimeError):
            Eva(tolerance=1.0).observe(model, NAMES, [2, 2, 2], [1, 1, 1], broken)
    else:
        Eva().observe(model, NAMES, [2, 2, 2], [1, 1, 1], stream)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_looking_twice_gives_the_same_bits_and_no_dropout(model: Attention) -> None:
    model.train()  # dropout would otherwise change what o reads
    one, other = Eva(), Eva()
    torch.manual_seed(1)
    ranks = one.observe(model, NAMES, [2, 2, 2], [1, 1, 1], passes(model, batches_of(sentences())))
    torch.manual_seed(2)
    assert ranks == other.observe(model, NAMES, [2, 2, 2], [1, 1, 1], passes(model, batches_of(sentences())))
    assert all(torch.equal(one.rows[n], other.rows[n]) for n in NAMES)


# ---- the start -----------------------------------------------------------------------------------------------------
PARTS = [Lora(), Components(), Svd(), WeightDecomposed(), Aflora(freeze_square=False)]
IDS = ["lora", "components", "svd", "weight_decomposed", "aflora"]


@pytest.mark.parametrize("part", PARTS, ids=IDS)
def test_every_adapter_starts_as_the_base_with_orthonormal_rows(part: Any, model: Attention) -> None:
    x = sentences()
    model.eval()
    before = model(x)
    eva = Eva()
    ranks = eva.observe(model, NAMES, [2, 2, 2], [1, 1, 1], passes(model, batches_of(x)))
    layers = inject(model, NAMES, part, ranks)
    for name, layer in layers.items():
        eva.fill(name, layer)
        assert torch.equal(layer.a, eva.rows[name])
        assert torch.allclose(layer.a @ layer.a.T, torch.eye(layer.rank), atol=1e-5)
    # weight_decomposed multiplies by magnitude / norm, which is 1 up to rounding
    assert torch.allclose(model(x), before, atol=1e-6 if isinstance(part, WeightDecomposed) else 0)


def test_whitening_divides_by_the_root_of_the_singular_value(model: Attention) -> None:
    plain, white = Eva(tolerance=1.0), Eva(tolerance=1.0, whiten=True)
    for eva in (plain, white):
        eva.observe(model, NAMES, [3, 3, 3], [1, 1, 1], passes(model, batches_of(sentences())))
    x = sentences().view(-1, 6)
    sizes = torch.linalg.svdvals((x - x.mean(dim=0)).double()).float()
    n = len(plain.rows["q"])
    assert torch.allclose(white.rows["q"] * sizes[:n, None].sqrt(), plain.rows["q"], rtol=1e-3, atol=1e-5)


def test_rows_that_no_data_span_are_filled_orthogonally_and_said(model: Attention) -> None:
    x = rows_of(60, 6, torch.tensor([3.0, 2.0])).view(12, 5, 6)
    eva = Eva(rho=1.0)
    assert eva.observe(model, ["q"], [4], [1], passes(model, batches_of(x))) == [4]
    assert len(eva.rows["q"]) == 2
    assert "1 modules span fewer directions than their rank" in " ".join(eva.notes)
    layer = Lora().layer(model.q, 4)
    eva.fill("q", layer)
    assert torch.equal(layer.a[:2], eva.rows["q"])
    assert torch.allclose(layer.a @ layer.a.T, torch.eye(4), atol=1e-5)


def test_a_rank_above_the_inputs_width_still_starts(model: Attention) -> None:
    eva = Eva()
    assert eva.observe(model, ["q"], [8], [1], passes(model, batches_of(sentences()))) == [8]
    layer = Lora().layer(model.q, 8)
    eva.fill("q", layer)
    assert torch.allclose(layer.a.norm(dim=1), torch.ones(8), atol=1e-5)


def test_gpt2s_transposed_layers_are_looked_at_alike() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=12, n_layer=1, n_head=2, n_inner=24)
    gpt = GPT2Model(config).eval()
    names = [n for n, m in gpt.named_modules() if isinstance(m, Conv1D)]
    assert len(names) == 4
    ids = [torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(i)) for i in range(12)]
    before = gpt(ids[0]).last_hidden_state
    eva = Eva()
    stream = ((torch.ones(8, 6, dtype=torch.bool), partial(gpt, i)) for i in ids)
    ranks = eva.observe(gpt, names, [3] * 4, [1] * 4, stream)
    assert sum(ranks) == 12
    wrapped = {n: r for n, r in zip(names, ranks, strict=True) if r}
    for name, layer in inject(gpt, list(wrapped), Lora(), list(wrapped.values())).items():
        eva.fill(name, layer)
        assert torch.allclose(layer.a @ layer.a.T, torch.eye(layer.rank), atol=1e-5)
    assert torch.equal(gpt(ids[0]).last_hidden_state, before)
