"""The optimizer, its groups, and the learning rate over time."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dora_cli.adapters.base import AdapterLayer
from dora_cli.adapters.inject import parameter_groups
from dora_cli.allocation.verdict import Verdict
from dora_cli.config.schema import TrainConfig


def build_optimizer(
    model: nn.Module, layers: Mapping[str, AdapterLayer], head_modules: list[str], config: TrainConfig
) -> torch.optim.Optimizer:
    """Fused AdamW over all that trains (see ``all_groups``)."""
    groups = all_groups(
        model,
        layers,
        head_modules,
        lr=config.learning_rate,
        head_lr=config.head_learning_rate,
        weight_decay=config.weight_decay,
    )
    return torch.optim.AdamW(groups, fused=True)


def all_groups(
    model: nn.Module,
    layers: Mapping[str, AdapterLayer],
    head_modules: list[str],
    *,
    lr: float,
    head_lr: float | None,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """An optimizer's groups: adapters, base weights that train, and the head with its own learning rate."""
    groups: list[dict[str, Any]] = parameter_groups(layers, lr=lr, weight_decay=weight_decay)
    mine = {id(p) for layer in layers.values() for p in layer.adapter_parameters().values()}
    rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in mine]
    head = [(n, p) for n, p in rest if any(n == h or n.startswith(h + ".") for h in head_modules)]
    in_head = {n for n, _ in head}
    body = [(n, p) for n, p in rest if n not in in_head]
    for named, rate in ((body, lr), (head, head_lr or lr)):
        # Biases and norms (vectors) are not decayed.
        groups.append({"params": [p for _, p in named if p.dim() > 1], "lr": rate, "weight_decay": weight_decay})
        groups.append({"params": [p for _, p in named if p.dim() <= 1], "lr": rate, "weight_decay": 0.0})
    # Adapters' groups stay even when empty: what is frozen now may be thawed.
    return [g for g in groups if g["params"] or "role" in g]


def optimizer_step(optimizer: torch.optim.Optimizer, verdict: Verdict) -> None:
    """Take the step, or leave weights, moments and step counts as they are."""
    if verdict.known is None:
        # What AdamW's fused kernel does not take where this is 1, without the host (torch.amp.GradScaler's way).
        optimizer.found_inf = 1.0 - verdict.taken  # type: ignore[attr-defined]
    if verdict.known is not False:
        optimizer.step()


def warmup_steps(warmup: float | int, total: int) -> int:
    return int(warmup) if warmup >= 1 else math.ceil(warmup * total)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up to the peak, then linear or cosine decay to 0 at the last step, or none."""
    warmup = warmup_steps(config.warmup, total)

    def factor(done: int) -> float:
        if done < warmup:
            return done / warmup
        x = (done - warmup) / max(1, total - warmup)
        if config.scheduler == "linear":
            return max(0.0, 1.0 - x)
        return 1.0 if config.scheduler == "constant" else 0.5 * (1.0 + math.cos(math.pi * min(x, 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
