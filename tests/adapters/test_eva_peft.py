"""EVA against PEFT's: the same ranks, rows and losses."""

from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from dora_cli.adapters.init.eva import Eva
from dora_cli.adapters.inject import inject
from dora_cli.adapters.lora import Lora

CPU = torch.device("cpu")


class Batches(list[Any]):
    """What PEFT asks of a loader."""


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():  # random BERTs treat all inputs alike; larger weights make inputs and modules differ
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.requires_grad_(False)


def tiny_batches(n: int = 20, seed: int = 5) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n):
        ids = torch.randint(0, 40, (16, 10), generator=g)
        lengths = torch.randint(3, 11, (16,), generator=g)
        mask = (torch.arange(10)[None] < lengths[:, None]).long()
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids[:, 1] % 2})
    return batches


def losses(model: nn.Module, trained: list[nn.Parameter], batches: list[dict[str, Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01)
    model.train()
    found = []
    for batch in batches[:20]:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("rho", [2.0, 1.0])
def test_ranks_rows_and_losses_are_those_of_peft(rho: float) -> None:
    """Inputs are 16 wide and candidates 8, so PEFT's sketch of twice as many directions is exact too."""
    peft = pytest.importorskip("peft")
    batches = tiny_batches()
    looked = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]  # no labels a token
    theirs = tiny_bert()
    names = [n for n, m in theirs.named_modules() if isinstance(m, nn.Linear) and ".encoder." in n]
    config = peft.LoraConfig(
        r=round(8 / rho),
        lora_alpha=8,
        target_modules=names,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=0.99),
    )
    wrapped = peft.get_peft_model(theirs, config)
    peft.initialize_lora_eva_weights(wrapped, Batches(looked), show_progress_bar=False)
    rows = {
        n.removeprefix("base_model.model."): m.lora_A["default"].weight.detach().clone()
        for n, m in wrapped.named_modules()
        if hasattr(m, "lora_A")
    }

    ours, eva, part = tiny_bert(), Eva(rho=rho), Lora(alpha=8.0)
    stream = ((b["attention_mask"].bool(), partial(ours, **b)) for b in cycle(looked))  # PEFT goes round and round
    asked = [round(8 / rho)] * len(names)
    ranks = eva.observe(ours, names, asked, [1] * len(names), stream)
    assert {n: r for n, r in zip(names, ranks, strict=True) if r} == {n: len(a) for n, a in rows.items()}
    if rho > 1:
        assert len(set(ranks)) > 2  # ranks did move
    layers = inject(ours, list(rows), part, [len(a) for a in rows.values()])
    for name, layer in layers.items():
        eva.fill(name, layer)
        layer.scale = part.scale(round(8 / rho))
        signs = (layer.a * rows[name]).sum(dim=1).sign()
        assert torch.allclose(layer.a * signs[:, None], rows[name], atol=2e-4), name

    mine = losses(ours, [p for layer in layers.values() for p in layer.adapter_parameters().values()], batches)
    expected = losses(wrapped, [p for n, p in wrapped.named_parameters() if "lora_" in n], batches)
    assert all(float(layer.b.detach().abs().max()) > 0.05 for layer in layers.values())  # it does train
    assert mine == pytest.approx(expected, abs=1e-5)
