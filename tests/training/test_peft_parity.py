"""The same model, start, data and optimizer in the toolkit and in PEFT: equal losses and masks at each of 20 steps.

``pytest -s`` shows the largest differences.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from dora_cli.adapters.inject import inject
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.svd import Svd
from dora_cli.adapters.weight_decomposed import WeightDecomposed
from dora_cli.allocation.allocators.none import NoAllocator
from dora_cli.allocation.allocators.prune_peft import PrunePeft
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.none import NoImportance
from dora_cli.allocation.importance.sensitivity import Sensitivity
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.regularizers.orthogonal import Orthogonal
from dora_cli.allocation.schedules import Constant, CubicEarly
from dora_cli.config.schema import TrainConfig
from dora_cli.training.optim import build_optimizer

peft = pytest.importorskip("peft")

STEPS, RANK, ALPHA, TARGET, GAMMA, LR, DECAY, CLIP = 20, 4, 6.0, 2, 0.2, 1e-2, 0.1, 0.5
START, END, INTERVAL = 3, 14, 2  # t_init, T − t_final, ΔT
NAMES = ["attention.self.query", "attention.self.key", "attention.self.value"]
NAMES += ["attention.output.dense", "intermediate.dense", "output.dense"]
TARGETS = [f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in NAMES]


@dataclass
class Step:
    """What is compared after a step: the loss before it, every adapter parameter, and the closed gates."""

    loss: float
    parameters: dict[str, Tensor]
    masks: list[list[bool]]


def tiny(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=3,
    )
    return BertForSequenceClassification(config).train()


def batches() -> Iterator[tuple[int, dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        ids = torch.randint(1, 30, (8, 10), generator=g)
        yield step, {"input_ids": ids, "labels": ids.sum(1) % 3}


def theirs(base: nn.Module, config: Any) -> tuple[dict[str, dict[str, Tensor]], list[Step]]:
    """PEFT's own way, by its documentation. Returns the start values, by module, and the steps."""
    model = peft.get_peft_model(copy.deepcopy(base), config).train()
    modules = {name: model.base_model.model.get_submodule(name) for name in TARGETS}
    starts = {name: {k: v.detach().clone() for k, v in peft_values(module).items()} for name, module in modules.items()}
    decays: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays["magnitude" not in name and "bias" not in name].append(parameter)
    groups = [{"params": p, "weight_decay": DECAY if d else 0.0} for d, p in decays.items()]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    steps = []
    for step, batch in batches():
        torch.manual_seed(step)
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], CLIP)
        optimizer.step()
        if isinstance(config, peft.AdaLoraConfig):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        steps.append(snapshot(loss.item(), {n: peft_values(module) for n, module in modules.items()}))
    return starts, steps


def ours(base: nn.Module, part: Any, starts: dict[str, dict[str, Tensor]], parts: dict[str, Any]) -> list[Step]:
    model = copy.deepcopy(base)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    layers = inject(model, TARGETS, part, [RANK] * len(TARGETS))
    for name, values in starts.items():
        for key, value in values.items():
            mine = layers[name].get_parameter(key)
            assert mine.shape == value.shape
            if key == "magnitude":
                assert torch.allclose(mine, value, rtol=1e-6)  # both have it from the weight; PEFT's is not needed
            else:
                mine.data.copy_(value)
    allocation = Allocation(
        layers, total_steps=STEPS, target=Target(TARGET * len(TARGETS), by_cost=False), **parts
    )  # no budget is read where nothing is allocated
    train = TrainConfig(learning_rate=LR, weight_decay=DECAY)
    optimizer = build_optimizer(model, layers, ["classifier"], train)
    steps = []
    for step, batch in batches():
        torch.manual_seed(step)
        loss = model(**batch).loss
        loss.backward()
        total = loss.item() + allocation.regularizer.weight * allocation.regularizer.value(allocation.table)
        allocation.after_backward(step)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], CLIP)
        optimizer.step()
        allocation.after_step(step, optimizer)
        optimizer.zero_grad()
        steps.append(snapshot(total, {n: layer.adapter_parameters() for n, layer in layers.items()}))
    return steps


def peft_values(module: Any) -> dict[str, Tensor]:
    """PEFT's parameters of one module under our names."""
    if hasattr(module, "lora_E"):
        named = {"a": module.lora_A["default"], "b": module.lora_B["default"], "c": module.lora_E["default"]}
        return named | {"c": named["c"].flatten()}
    values = {"a": module.lora_A["default"].weight, "b": module.lora_B["default"].weight}
    if module.lora_magnitude_vector:
        values["magnitude"] = module.lora_magnitude_vector["default"].weight
    return values


def snapshot(loss: float, modules: dict[str, dict[str, Tensor]]) -> Step:
    flat = {f"{name}.{key}": v.detach().clone() for name, values in modules.items() for key, v in values.items()}
    masks = [(flat[f"{name}.c"] == 0).tolist() for name in modules if f"{name}.c" in flat]
    return Step(loss, flat, masks)


def nothing() -> dict[str, Any]:
    return {
        "schedule": Constant(),
        "importance": NoImportance(),
        "allocator": NoAllocator(),
        "regularizer": NoRegularizer(),
    }


def adalora() -> dict[str, Any]:
    return {
        "schedule": CubicEarly(start=START, end=END),
        "importance": Sensitivity(),
        "allocator": PrunePeft(interval=INTERVAL),
        "regularizer": Orthogonal(weight=GAMMA),
    }


def config(method: str, dropout: float) -> Any:
    common = {"task_type": "SEQ_CLS", "target_modules": TARGETS, "lora_alpha": ALPHA, "lora_dropout": dropout}
    if method == "adalora_official":
        return peft.AdaLoraConfig(
            **common,
            init_r=RANK,
            target_r=TARGET,
            tinit=START,
            tfinal=STEPS - END,
            deltaT=INTERVAL,
            total_step=STEPS,
            orth_reg_weight=GAMMA,
        )
    return peft.LoraConfig(
        **common, r=RANK, use_rslora=method == "rslora", use_dora=method.startswith("weight_decomposed")
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("method", ["lora", "rslora", "weight_decomposed", "adalora_official"])
def test_twenty_steps_are_pefts(method: str, dropout: float) -> None:
    base = tiny(dropout)
    part, parts = {
        "lora": (Lora(alpha=ALPHA, dropout=dropout), nothing),
        "rslora": (Lora(alpha=ALPHA, dropout=dropout, scaling="rank_stabilised"), nothing),
        "weight_decomposed": (WeightDecomposed(alpha=ALPHA, dropout=dropout), nothing),
        "adalora_official": (Svd(alpha=ALPHA, dropout=dropout, decay_gates=True), adalora),
    }[method]
    starts, reference = theirs(base, config(method, dropout))
    steps = ours(base, part, starts, parts())

    losses = [abs(mine.loss - its.loss) for mine, its in zip(steps, reference, strict=True)]
    last, its_last = steps[-1].parameters, reference[-1].parameters
    assert last.keys() == its_last.keys()
    parameters = max(float((last[k] - its_last[k]).abs().max()) for k in last)
    print(f"\n{method}, dropout {dropout}: losses differ by {max(losses):.1e} at most, parameters by {parameters:.1e}")
    for step, (mine, its) in enumerate(zip(steps, reference, strict=True), start=1):
        assert abs(mine.loss - its.loss) < 1e-5, f"step {step}: {mine.loss} against {its.loss}"
        assert mine.masks == its.masks, f"step {step}"
    assert abs(reference[0].loss - reference[-1].loss) > 1e-2, "nothing was trained: a test of nothing"

    if method == "adalora_official":
        closed = [sum(map(sum, step.masks)) for step in steps]
        assert closed[START - 1] == 0  # no event yet: all gates have moved away from their start
        assert closed[-1] == (RANK - TARGET) * len(TARGETS)
        assert len({c for c in closed if c}) > 3, "too few cuts to compare"
        assert any(closed[t] == 0 for t in range(START, END - 1)), "between events masked gates move again"
        assert len(set(map(sum, steps[-1].masks))) > 1, "every module kept as many: too easy"
