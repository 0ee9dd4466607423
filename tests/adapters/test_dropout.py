"""Masks: what a Bernoulli mask is like, a function of their place alone, shared by siblings, free of torch's state."""

import pytest
import torch
from torch import nn

from dora_cli.adapters.components import Components
from dora_cli.adapters.dropout import ALIGNMENT, BLOCK, Masks, attach, groups_of
from dora_cli.adapters.mora import Mora

ROWS, WIDTH = 400, 500


def mask(masks: Masks, step: int = 1, micro: int = 0, group: str = "g", rows: int = ROWS) -> torch.Tensor:
    masks.move(step, micro)
    return masks.window(torch.empty(rows, WIDTH), group)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_entries_are_dropped_with_the_probability_asked_for_and_the_others_scaled_up(p: float) -> None:
    m = torch.stack([mask(Masks(p, 3), step) for step in range(5)])
    n = m.numel()
    assert m.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    dropped = float((m == 0).double().mean())
    assert abs(dropped - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_in_bfloat16_the_mean_stays_one() -> None:
    masks = Masks(0.1, 3)
    masks.move(1, 0)
    m = masks.window(torch.empty(2000, 1000, dtype=torch.bfloat16), "g").double()
    p = float((m == 0).double().mean())
    assert abs(p - 0.1) < 2e-3
    assert abs(float(m.mean()) - 1) < 5 * (0.1 / 0.9 / m.numel()) ** 0.5


def test_entries_are_uncorrelated_within_a_mask_and_between_masks() -> None:
    masks = Masks(0.3, 7)
    kept = [(mask(masks, step, micro, group) > 0).double() for step in (1, 2) for micro in (0, 1) for group in "gh"]
    pairs = [(kept[0], other) for other in kept[1:]]
    pairs += [(kept[0][:, :-lag], kept[0][:, lag:]) for lag in (1, 2, ALIGNMENT, 64)]
    pairs += [(kept[0][:-lag], kept[0][lag:]) for lag in (1, 7)]
    for one, other in pairs:
        correlation = float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
        assert abs(correlation) < 5 / one.numel() ** 0.5


def test_every_entry_is_dropped_in_its_share_of_steps() -> None:
    masks = Masks(0.2, 1)
    steps = 2000
    share = torch.zeros(8, WIDTH)
    for step in range(steps):
        share += mask(masks, step, rows=8) == 0
    share /= steps
    assert float((share - 0.2).abs().max()) < 5 * (0.16 / steps) ** 0.5


def test_a_mask_is_a_function_of_seed_step_micro_batch_and_group_alone() -> None:
    torch.manual_seed(0)
    first = mask(Masks(0.1, 5), 3, 1, "g")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    other = Masks(0.1, 5)
    mask(other, 1, 0, "h", rows=30_000)  # a longer sequence by now, and another order
    assert torch.equal(mask(other, 3, 1, "g"), first)
    assert torch.equal(torch.get_rng_state(), state)
    for seed, step, micro, group in ((6, 3, 1, "g"), (5, 4, 1, "g"), (5, 3, 0, "g"), (5, 3, 1, "h")):
        assert not torch.equal(mask(Masks(0.1, seed), step, micro, group), first)


def test_a_window_is_never_more_than_half_of_the_sequence() -> None:
    masks = Masks(0.5, 1)
    x = torch.empty(BLOCK // 2 + 16)
    masks.move(1, 0)
    a = masks.window(x, "a")
    assert len(masks._sequences[x.device, x.dtype]) == 2 * BLOCK
    assert a.shape == x.shape


def test_siblings_are_found_by_their_names_and_only_below_one_parent() -> None:
    names = ["l.0.attn.q_proj", "l.0.attn.k_proj", "l.0.attn.o_proj", "l.1.attn.q_proj", "l.0.mlp.gate_proj",
             "l.0.mlp.up_proj", "l.0.mlp.down_proj", "h.self.query", "h.self.value"]  # fmt: skip
    groups = groups_of(names, shared=True)
    same = {frozenset(n for n in names if groups[n] == g) for g in groups.values()}
    assert same == {
        frozenset({"l.0.attn.q_proj", "l.0.attn.k_proj"}), frozenset({"l.0.mlp.gate_proj", "l.0.mlp.up_proj"}),
        frozenset({"h.self.query", "h.self.value"}),
        *(frozenset({n}) for n in ("l.0.attn.o_proj", "l.1.attn.q_proj", "l.0.mlp.down_proj")),
    }  # fmt: skip
    assert len(set(groups_of(names, shared=False).values())) == len(names)


def test_in_cross_attention_the_query_reads_another_input() -> None:
    names = ("d.0.layer.1.EncDecAttention.q", "d.0.layer.1.EncDecAttention.k", "d.0.layer.1.EncDecAttention.v")
    groups = groups_of(names, shared=True)
    assert groups[names[0]] == names[0] and groups[names[1]] == groups[names[2]] != names[1]
    bart = [f"m.encoder_attn.{n}_proj" for n in "qkv"] + [f"m.self_attn.{n}_proj" for n in "qkv"]
    assert len(set(groups_of(bart, shared=True).values())) == 3
    bert = [f"l.crossattention.self.{n}" for n in ("query", "key", "value")]
    assert len(set(groups_of(bert, shared=True).values())) == 2


def test_siblings_share_the_work_but_never_a_stale_input() -> None:
    masks = Masks(0.5, 1)
    masks.move(1, 0)
    x = torch.ones(64, 64)
    first = masks.drop(x, "l.k|q")
    assert masks.drop(x, "l.k|q") is first
    other = masks.drop(torch.full((64, 64), 2.0), "l.k|q")
    assert torch.equal(other.values, 2 * first.values)
    again = masks.drop(x, "l.k|q")
    x.mul_(3)
    assert torch.equal(masks.drop(x, "l.k|q").values, 3 * again.values)
    masks.move(2, 0)
    assert not torch.equal(masks.drop(x, "l.k|q").mask, first.mask)
    alone = masks.drop(x, "l.o")
    assert masks.drop(x, "l.o") is not alone  # nothing is held for a module without siblings
    assert torch.equal(masks.drop(x, "l.o").values, alone.values)


def test_layers_drop_in_training_alone_and_by_torch_where_no_masks_are_attached() -> None:
    layer = Components(dropout=0.5).layer(nn.Linear(64, 64).requires_grad_(False), 4)
    nn.init.normal_(layer.c)
    x = torch.randn(8, 64)
    torch.manual_seed(0)
    by_torch = layer(x)
    assert not torch.equal(layer(x), by_torch)  # drawn anew
    masks = attach({"q": layer}, 0.5, 1, shared=True)
    assert masks is not None
    masks.move(1, 0)
    assert torch.equal(layer(x), layer(x))
    one = layer(x)
    masks.move(2, 0)
    assert not torch.equal(layer(x), one)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ layer.delta_weight().T, atol=1e-4)


def test_without_dropout_there_are_no_masks_and_every_adapter_takes_them() -> None:
    layers = {"q": Mora(dropout=0.25).layer(nn.Linear(64, 64).requires_grad_(False), 4)}
    assert Components().masks(layers, 1) is None
    masks = Mora(dropout=0.25).masks(layers, 1)
    assert masks is not None
    nn.init.normal_(layers["q"].m)
    masks.move(1, 0)
    x = torch.randn(3, 64)
    layer = layers["q"]
    dropped = x * masks.window(x, "q")
    assert torch.allclose(layer(x), layer.base_layer(x) + dropped @ layer.delta_weight().T, atol=1e-4)
