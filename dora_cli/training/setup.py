"""From a composed configuration to everything the loop needs. Nothing is written here."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dora_cli.adapters.base import AdapterLayer, LowRankPart, linear_shape
from dora_cli.adapters.inject import inject, remove
from dora_cli.allocation import rules
from dora_cli.allocation.budget import Budget, Target, check_reachable, parse_budget, resolve, spread
from dora_cli.allocation.controller import Allocation
from dora_cli.config.schema import Config
from dora_cli.data.batching import LengthGroupedBatches, batches
from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import Rows, load_rows
from dora_cli.data.tasks import build_task
from dora_cli.data.tasks.base import Task
from dora_cli.errors import UserError
from dora_cli.models.load import load_model
from dora_cli.models.targets import find_targets
from dora_cli.training.optim import build_optimizer, build_scheduler

Batch = dict[str, Tensor]
IGNORED = -100  # the label of a token that the loss leaves out


class Composed(Protocol):
    """What set-up needs of ``config.compose``'s result."""

    @property
    def config(self) -> Config: ...
    @property
    def parts(self) -> dict[str, Any]: ...
    @property
    def names(self) -> dict[str, str]: ...
    @property
    def recipe(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def dropped(self) -> list[str]: ...
    @property
    def yaml(self) -> str: ...


@dataclass
class Session:
    """One run's parts, built and joined."""

    composed: Composed
    model: nn.Module
    tokenizer: Any
    task: Task
    encoded: dict[str, Encoded]  # role → encoded rows
    rows: Rows
    head_modules: list[str]
    source: str  # where the base comes from: an absolute folder, package://…, or a hub name
    layers: dict[str, AdapterLayer]
    targets: list[str]
    start_ranks: list[int]
    budget: Budget | None
    allocation: Allocation
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    device: torch.device
    total_steps: int
    steps_per_epoch: int
    plan: LengthGroupedBatches
    notes: Sequence[str]  # of the start that looked at data, for the plan
    forward: nn.Module = field(init=False)  # the model, or its compiled form

    def __post_init__(self) -> None:
        self.forward = torch.compile(self.model) if self.config.train.compile else self.model  # type: ignore[assignment]

    @property
    def config(self) -> Config:
        return self.composed.config

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return autocast_dtype(self.config.train.precision)

    def micro_batches(self, first: int) -> Iterator[Batch]:
        """The endless stream of training micro-batches from the ``first``-th on: a function of seed and position."""
        n = len(self.plan)
        epoch, skip = divmod(first, n)
        pin = self.device.type == "cuda"
        while True:
            plan = self.plan.epoch(epoch)
            yield from batches(self.encoded["train"], plan, workers=self.config.train.workers, pin=pin, skip=skip)
            epoch, skip = epoch + 1, 0

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that training changes or has changed, by full name: adapters, head, or all of them."""
        adapted = {f"{m}.{n}" for m, layer in self.layers.items() for n in layer.adapter_parameters()}
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad or n in adapted}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The type that the forward pass is cast to; None for the weights' own."""
    return torch.bfloat16 if precision == "bf16" else None


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: the device asked for is not here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(n for n in ("cuda", "mps", "cpu") if available[n]))
    if not available[name]:
        raise UserError(f"train.device={name}: this machine has none", hint="use train.device=auto or train.device=cpu")
    return torch.device(name)


def build(composed: Composed) -> Session:
    """Load, adapt and join everything, cheapest checks first.

    Raises:
        UserError: whatever in the configuration, the data or the model does not fit.
    """
    config, parts = composed.config, composed.parts
    units = rules.check(**parts, names=composed.names)
    budget = _budget(composed)
    _check_values(composed, budget)
    device = pick_device(config.train.device)

    rows = load_rows(config.data, offline=config.offline, seed=config.seed)
    task = build_task(config.data)
    task.fit(rows)

    seed_everything(config.seed)
    loaded = load_model(
        config.model,
        auto_class=task.auto_class,
        offline=config.offline,
        max_length=config.data.max_length,
        **task.model_kwargs(),
    )
    model = loaded.model
    encoded = {role: task.encode(split, loaded.tokenizer) for role, split in rows.splits.items()}

    model.requires_grad_(False)
    parts["adapter"].unfreeze(model, loaded.head_modules)
    for name in loaded.head_modules:
        model.get_submodule(name).requires_grad_(True)
    targets, ranks, target = _targets(composed, model, loaded.head_modules, budget)
    model.to(device)
    plan = LengthGroupedBatches(encoded["train"].lengths, config.train.batch_size, config.seed)
    start = getattr(parts["adapter"], "start", lambda: None)()
    asked = dict(zip(targets, ranks, strict=True))
    if start is not None:
        by_cost = target is not None and target.by_cost and parts["allocator"].mode not in ("shrink", "grow")
        ranks = _looked(start, model, targets, ranks, parts["adapter"], by_cost, task, encoded, plan, device)
    wrapped = {n: r for n, r in zip(targets, ranks, strict=True) if r > 0 or parts["allocator"].grows}
    seed_everything(config.seed)
    layers = inject(model, list(wrapped), parts["adapter"], list(wrapped.values()))
    if start is not None:
        _fill(start, layers, parts["adapter"], asked)
    if config.train.gradient_checkpointing:
        _checkpoint_activations(model)

    steps_per_epoch = ceil(len(plan) / config.train.accumulation)
    total_steps = config.train.max_steps or ceil(config.train.epochs * len(plan) / config.train.accumulation)
    allocation = Allocation(
        layers,
        schedule=parts["schedule"],
        importance=parts["importance"],
        allocator=parts["allocator"],
        regularizer=parts["regularizer"],
        total_steps=total_steps,
        target=target,
        probe=_probe(model, task, encoded, parts["importance"], device),
        units=units,
    )
    allocation.on_empty(lambda name: remove(model, name))
    optimizer = build_optimizer(model, layers, loaded.head_modules, config.train)
    return Session(
        composed=composed,
        model=model,
        tokenizer=loaded.tokenizer,
        task=task,
        encoded=encoded,
        rows=rows,
        head_modules=loaded.head_modules,
        source=config.model.name if config.model.name.startswith("package://") else loaded.source,
        layers=layers,
        targets=targets,
        start_ranks=ranks,
        budget=budget,
        allocation=allocation,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.train, total_steps),
        device=device,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        plan=plan,
        notes=start.notes if start is not None else (),
    )


def _checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass; transformers renamed the switch in 5.23."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _check_values(composed: Composed, budget: Budget | None) -> None:
    """What the parts' options and the training options must agree on."""
    parts, config = composed.parts, composed.config
    parts["allocator"].check(config.train.learning_rate, parts["schedule"], budget)
    start = getattr(parts["adapter"], "start", lambda: None)()
    lacking = start.needs - parts["adapter"].provides if start else frozenset()
    if lacking:
        raise UserError(
            f"adapter.init={parts['adapter'].init} needs {', '.join(sorted(lacking))}, which "
            f"adapter={composed.names['adapter']} does not have",
            hint="use adapter.init=default, or another adapter",
        )
    if config.export == "uniform" and parts["adapter"].export not in ("lora", "decomposed"):
        raise UserError(
            f"export=uniform: the update of method={composed.method} is no pair of low-rank factors",
            where="servers read low-rank adapters only",
            hint="merge it: save.merged=true writes RUN/merged, or use dora-merge checkpoint=RUN out=DIR afterwards",
        )


def _looked(
    start: Any,
    model: nn.Module,
    targets: list[str],
    ranks: list[int],
    adapter: Any,
    by_cost: bool,
    task: Task,
    encoded: Mapping[str, Encoded],
    plan: LengthGroupedBatches,
    device: torch.device,
) -> list[int]:
    """Let a data-driven start look at the bare model's inputs; returns the ranks as it redistributes them."""
    if not start.looks:
        return ranks

    def passes() -> Iterator[tuple[Tensor, Callable[[], object]]]:
        for batch in batches(encoded["train"], plan.epoch(0)):
            batch = {k: v.to(device) for k, v in batch.items()}
            yield _tokens(batch), partial(task.loss, model, batch)

    modules = [model.get_submodule(name) for name in targets]
    costs = [adapter.unit_cost(*linear_shape(module)) if by_cost else 1 for module in modules]
    moved: list[int] = start.observe(model, targets, ranks, costs, passes())
    return moved


def _tokens(batch: Batch) -> Tensor:
    """Which positions (n, s) of a batch are real: no padding, and where each token has a label, those that count."""
    real, labels = batch["attention_mask"].bool(), batch.get("labels")
    per_token = labels is not None and labels.shape == real.shape
    return real & (labels != IGNORED) if per_token else real


def _fill(start: Any, layers: Mapping[str, Any], adapter: Any, asked: Mapping[str, int]) -> None:
    """Start the factors. The scale alpha / rank stays that of the rank asked for, wherever ranks have moved."""
    for name, layer in layers.items():
        start.fill(name, layer)
        if isinstance(adapter, LowRankPart):
            layer.scale = adapter.scale(asked[name])


def _budget(composed: Composed) -> Budget | None:
    """The budget as asked, or None where the method has none; refused early where it can't be read."""
    budget = parse_budget(composed.config.budget)
    adapter = composed.parts["adapter"]
    if not adapter.budgeted:
        return None
    allocator = composed.parts["allocator"]
    if budget is None and allocator.mode in ("shrink", "grow"):
        raise UserError(
            f"method={composed.method} works towards a budget, but none is set",
            hint="set for example budget=r8 (average rank), budget=0.1 (share) or budget=340k (parameters)",
        )
    if budget is None and adapter.rank is None:
        raise UserError("neither budget nor adapter.rank says how large the adapter is", hint="set budget=r8")
    if budget is not None and budget.kind == "share" and adapter.rank is None:
        resolve(budget, [1], None, shrinks=False)  # refuses: a share needs a rank
    if budget is not None:
        floor = max(adapter.min_rank, getattr(allocator, "min_rank", 0))
        first = getattr(allocator, "start_rank", 1)
        check_reachable(budget, allocator.mode, adapter.rank, floor=floor, first=first, method=composed.method)
    return budget


def _targets(
    composed: Composed, model: nn.Module, head_modules: list[str], budget: Budget | None
) -> tuple[list[str], list[int], Target | None]:
    """Names of the target modules, their ranks at the start, and the resolved budget."""
    adapter, allocator = composed.parts["adapter"], composed.parts["allocator"]
    if not adapter.wraps:
        return [], [], None
    names = find_targets(model, adapter.targets, exclude=head_modules)
    costs = [adapter.unit_cost(*linear_shape(model.get_submodule(name))) for name in names]
    if budget is None:
        return names, [adapter.rank] * len(names), None
    if allocator.mode == "grow":
        rank = allocator.start_rank
        target = resolve(budget, costs, adapter.rank, shrinks=False)
        if target.by_cost and target.limit <= rank * sum(costs):
            raise UserError(
                f"budget={budget.text} is no more than the adapter starts with",
                where=f"{len(names)} modules × rank {rank} = {rank * sum(costs):,} parameters",
                hint="raise the budget",
            )
        return names, [rank] * len(names), target
    shrinks = allocator.mode == "shrink"
    rank = adapter.rank if adapter.rank is not None else budget.start_rank(costs)
    target = resolve(budget, costs, rank, shrinks=shrinks)
    if not shrinks:
        return names, spread(target, costs), target
    floor = max(adapter.min_rank, getattr(allocator, "min_rank", 0))
    if floor * (sum(costs) if target.by_cost else len(costs)) > target.limit:
        raise UserError(
            f"each module must keep {floor} components at least, which is more than budget={budget.text} leaves",
            where=f"{len(names)} modules × {floor} against {target.limit:,}",
            hint="raise the budget, or lower allocator.min_rank where the method allows it",
        )
    assert rank is not None
    return names, [rank] * len(names), target


def _probe(model: nn.Module, task: Task, encoded: Mapping[str, Encoded], importance: Any, device: torch.device) -> Any:
    """The loss on a fixed batch of validation rows, in eval mode, leaving no trace; None where nobody asks for it."""
    if "probe" not in importance.needs:
        return None
    rows = encoded["validation"]
    batch = rows.collate([rows[i] for i in range(min(importance.rows, len(rows)))])
    batch = {k: v.to(device) for k, v in batch.items()}

    def probe() -> float:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                loss, count, _ = task.loss(model, batch)
            return float(loss) / count
        finally:
            model.train(training)

    return probe
