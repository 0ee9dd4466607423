"""What one architecture has and others have not: an output of its own to adapt, one layer at every depth."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import inject
from dora_cli.models.targets import find_targets

LANGUAGE = "AutoModelForCausalLM"


def test_an_output_of_its_own_is_adapted_where_it_is_named(
    save_base: Callable[..., Any], tune: Callable[..., Any], check_same: Callable[..., Any]
) -> None:
    save_base("llama", LANGUAGE, LANGUAGE)
    run = tune(LANGUAGE, "adapter.targets=[attention,lm_head]")
    assert run.session.targets[-1] == "lm_head" and len(run.session.targets) == 9
    assert run.session.allocation.alive_count() == 18
    assert run.session.layers["lm_head"].rank, "pruned away: a test of nothing"
    check_same(run)


def test_a_shared_layer_has_the_gradient_of_every_depth(tiny_models: Any) -> None:
    """Equal to the sum over depths of what copies, one for each depth, have each."""
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.AutoModelForSequenceClassification.from_config(tiny_models.make_config("albert"))
    model.double().eval().requires_grad_(False)
    targets = find_targets(model, None, [])
    layers = inject(model, targets, Components(), [3] * len(targets))
    for layer in layers.values():
        nn.init.normal_(layer.double().c)  # type: ignore[arg-type]
    apart = copy.deepcopy(model)  # two groups of one layer each, where there was one for both depths
    groups = apart.albert.encoder.albert_layer_groups
    groups.append(copy.deepcopy(groups[0]))
    apart.albert.encoder.config = copy.deepcopy(apart.config)
    apart.albert.encoder.config.num_hidden_groups = 2

    ids = torch.randint(4, 44, (3, 7))
    for m in (model, apart):
        nn.functional.cross_entropy(m(input_ids=ids).logits, torch.tensor([0, 1, 1])).backward()
    for name, layer in layers.items():
        first, second = (apart.get_submodule(name.replace("groups.0", f"groups.{i}")) for i in (0, 1))
        for key in ("a", "b", "c"):
            ours, one, other = (getattr(m, key).grad for m in (layer, first, second))
            assert torch.allclose(ours, one + other, rtol=1e-9, atol=1e-15)
            assert float(one.abs().max()) > 0 and float(other.abs().max()) > 0
