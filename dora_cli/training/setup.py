"""From a composed configuration to everything the loop needs. Nothing is written here but the cache of tokens."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dora_cli.adapters.base import AdapterLayer, is_packed, linear_shape
from dora_cli.adapters.dropout import Masks
from dora_cli.adapters.inject import inject, remove
from dora_cli.adapters.siblings import Siblings, join
from dora_cli.adapters.token_rows import TokenRows, train_rows
from dora_cli.allocation import rules
from dora_cli.allocation.budget import Budget
from dora_cli.allocation.controller import Allocation
from dora_cli.config.schema import Config
from dora_cli.data.batching import LengthGroupedBatches, batches, dealt, has_share
from dora_cli.data.encoded import Encoded
from dora_cli.data.packing import pack
from dora_cli.data.sources import Rows, buffer_size, load_rows
from dora_cli.data.streaming import BatchStream, Block
from dora_cli.data.tasks import build_task
from dora_cli.data.tasks.base import Task
from dora_cli.errors import UserError
from dora_cli.models.load import load_model
from dora_cli.models.new_tokens import NewTokens
from dora_cli.models.quantised import STORED, Quantised, require_package
from dora_cli.models.targets import stacked_experts
from dora_cli.processes import ALONE, World
from dora_cli.training.apart.wire import Traffic
from dora_cli.training.optim import build_optimizer, build_scheduler
from dora_cli.training.parallel import OwnRandom, sample
from dora_cli.training.passes import first_row, keeping_apart, probes
from dora_cli.training.shard import is_sharded, refuse_layer_drop, shard
from dora_cli.training.sizing import asked_budget, check_values, sized_targets
from dora_cli.training.start import fill, passes

Batch = dict[str, Tensor]
Begin = Callable[[dict[str, AdapterLayer], nn.Module], object]


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
    @property
    def data(self) -> str: ...
    @property
    def preset(self) -> dict[str, Any]: ...
    @property
    def origin(self) -> dict[str, str | None]: ...
    @property
    def tuned(self) -> dict[str, Any]: ...


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
    quantised: Quantised | None  # which weights of the base are packed
    new_tokens: NewTokens | None  # whose embeddings train
    token_rows: dict[str, TokenRows]  # their rows, by full name
    layers: dict[str, AdapterLayer]
    targets: list[str]
    start_ranks: list[int]
    budget: Budget | None
    allocation: Allocation
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    device: torch.device
    total_steps: int
    steps_per_epoch: int | None  # None where training rows are streamed
    plan: LengthGroupedBatches  # of ``encoded["train"]``, which is the first buffer of what is streamed
    stream: BatchStream | None
    masks: Masks | None  # of the adapters' dropout
    siblings: list[Siblings]  # layers that are computed together
    notes: Sequence[str]  # of the start that looked at data, for the plan
    world: World
    sharded: bool  # whether each process holds a part of the frozen base
    own_random: OwnRandom | None  # of the forward pass; None for one process alone
    hollow: bool  # whether the base has shapes but no numbers: good for a plan alone
    origin: str  # a digest of the weights before training, where several processes have to agree
    traffic: Traffic | None = None  # with the process that has the base, where that is apart
    forward: nn.Module = field(init=False)  # the model, or its compiled form
    _candidates: tuple[int, list[nn.Parameter]] | None = None

    def __post_init__(self) -> None:
        self.forward = torch.compile(self.model) if self.config.train.compile else self.model  # type: ignore[assignment]

    @property
    def config(self) -> Config:
        return self.composed.config

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return autocast_dtype(self.config.train.precision)

    def micro_batches(self, first: int) -> Iterator[tuple[Batch, bool]]:
        """This process's share of the endless stream of training micro-batches from the ``first``-th on, a function of
        seed and position; and whether it is one, or a row that is to count for nothing.

        Where rows are streamed, the position is the stream's own, which a checkpoint holds.
        """
        pin = self.device.type == "cuda"
        if self.stream is not None:
            return self.stream.batches(pin=pin)
        plan, whole = dealt(self.plan.stream(first), self.world), self.plan.stream(first)
        mine = batches(self.encoded["train"], plan, workers=self.config.train.workers, pin=pin)
        return ((batch, has_share(rows, self.world)) for rows, batch in zip(whole, mine, strict=False))

    def rows_of(self, step: int) -> list[tuple[Block, int]]:
        """The training rows of a step (of a stream, one since the last log), and where each lies."""
        per_step = self.config.train.accumulation
        if self.stream is not None:
            return self.stream.rows_of((step - 1) * per_step, step * per_step)
        block, stream = Block(self.rows, self.encoded["train"]), self.plan.stream((step - 1) * per_step)
        return [(block, row) for _ in range(per_step) for row in next(stream)]

    def candidates(self) -> list[nn.Parameter]:
        """Every parameter that may have a gradient, in the model's order; looked up only after a change of shapes."""
        if self._candidates is None or self._candidates[0] != self.allocation.table.version:
            mine = {id(p) for layer in self.layers.values() for p in layer.adapter_parameters().values()}
            found = [p for p in self.model.parameters() if p.requires_grad or id(p) in mine]
            self._candidates = self.allocation.table.version, found
        return self._candidates[1]

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


def pick_device(name: str, world: World = ALONE) -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU; of several processes on one machine each its own GPU.

    Raises:
        UserError: the device asked for is not here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if available[n] and (world.alone or n != "mps"))
    if name == "mps" and not world.alone:
        raise UserError("train.device=mps: several processes need CUDA or the CPU", hint="set train.device=cpu")
    if not available[name]:
        raise UserError(f"train.device={name}: this machine has none", hint="use train.device=auto or train.device=cpu")
    if name != "cuda" or world.alone:
        return torch.device(name)
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {world.rank} is number {world.local_rank + 1} on a machine with {torch.cuda.device_count()} GPUs",
            hint="start torchrun with one process per GPU: --nproc-per-node=gpu",
        )
    return torch.device(name, world.local_rank)


def build(composed: Composed, begin: Begin | None = None, world: World = ALONE) -> Session:
    """Load, adapt and join everything, cheapest checks first. Processes do not communicate here.

    Args:
        composed: the configuration and its parts.
        begin: puts trained values into fresh layers and head, before anything looks at them.
        world: this process among those of the run.

    Raises:
        UserError: whatever in the configuration, the data or the model does not fit.
    """
    config, parts = composed.config, composed.parts
    units = rules.check(**parts, names=composed.names)
    if kind := config.model.quantization:
        rules.check_base(parts["adapter"], f"model.quantization={kind}", composed.names)
        require_package(kind)
    budget = asked_budget(composed)
    check_values(composed, budget)
    if config.train.batch_size < world.size:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is shared out among {world.size} processes",
            hint=f"set it to {world.size} or more: a row for each process",
        )
    device, dtype = pick_device(config.train.device, world), autocast_dtype(config.train.precision)

    rows = load_rows(config.data, offline=config.offline, seed=config.seed, stream=buffer_size(config.data))
    task = build_task(replace(config.data, cache=None) if config.data.streaming else config.data)
    task.fit(rows)

    seed_everything(config.seed)
    loaded = load_model(
        config.model,
        auto_class=task.auto_class,
        offline=config.offline,
        max_length=config.data.max_length,
        max_target_length=config.data.max_target_length,
        as_stored=dtype is not None,
        device=device,
        for_plan=bool(config.dry_run),
        **task.model_kwargs(),
    )
    model = loaded.model
    if loaded.quantised is not None:
        rules.check_base(parts["adapter"], f"model.name={config.model.name}", composed.names)
        if config.save.merged and loaded.quantised.kind == STORED:
            raise UserError(
                f"save.merged=true: nothing can be added to the quantised weights that {config.model.name} stores",
                hint="leave it out; dora-merge adds the adapter to the original with base=NAME",
            )
    encoded = {role: task.encode(split, loaded.tokenizer) for role, split in rows.splits.items()}

    model.requires_grad_(False)
    parts["adapter"].unfreeze(model, loaded.head_modules)
    for name in loaded.head_modules:
        model.get_submodule(name).requires_grad_(True)
    if trained := [n for n in stacked_experts(model) if model.get_parameter(n).requires_grad]:
        raise UserError(
            f"method={composed.method} trains the experts of a mixture, such as '{trained[0]}', which is not supported",
            hint="choose a low-rank method: it adapts attention and shared experts",
        )
    targets, ranks, target = sized_targets(composed, model, loaded.head_modules, budget)
    token_rows = _token_rows(model, loaded.new_tokens, targets)
    if dtype is not None:
        lower(model, dtype)
    packed = loaded.hollow and config.model.quantization is not None
    sharded = is_sharded(config.train.shard, model, world, device, packed=packed)
    if sharded or (not world.alone and parts["importance"].sums):
        refuse_layer_drop(model)
    splits = sharded and not config.dry_run
    place = torch.device("cpu") if splits else device  # until it is split, no device need hold all of it
    if not loaded.hollow:
        model.to(place)
    if config.data.packing and loaded.hollow:
        encoded["train"] = pack(encoded["train"], config.data.max_length)
    elif config.data.packing:
        encoded["train"] = keeping_apart(model, task, encoded["train"], config.data.max_length, place, dtype)
    plan = LengthGroupedBatches(encoded["train"].lengths, config.train.batch_size, config.seed)
    start = getattr(parts["adapter"], "start", lambda: None)() if not loaded.hollow else None
    asked = dict(zip(targets, ranks, strict=True))
    if start is not None and start.looks:
        by_cost = target is not None and target.by_cost and parts["allocator"].mode not in ("shrink", "grow")
        shapes = [linear_shape(model.get_submodule(name)) for name in targets]
        costs = [parts["adapter"].unit_cost(*shape) if by_cost else 1 for shape in shapes]
        looks = passes(model, task, encoded["train"], plan, place, dtype)
        ranks = start.observe(model, targets, ranks, costs, looks)
    wrapped = {n: r for n, r in zip(targets, ranks, strict=True) if r > 0 or parts["allocator"].grows}
    seed_everything(config.seed)
    layers = inject(model, list(wrapped), parts["adapter"], list(wrapped.values()))
    if start is not None:
        fill(start, layers, parts["adapter"], asked)
    if begin is not None:
        begin(layers, model)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    origin = "" if world.alone or loaded.hollow else sample(model)
    if splits:
        shard(model, device)

    stream = _stream(task, loaded.tokenizer, rows, config, world) if rows.stream is not None else None
    steps_per_epoch = ceil(len(plan) / config.train.accumulation) if stream is None else None
    total_steps = config.train.max_steps or ceil(config.train.epochs * len(plan) / config.train.accumulation)
    at_once = config.train.eval_batch_size
    losses = probes(model, task, encoded["validation"], parts, config.seed, at_once, device, dtype, world)
    allocation = Allocation(
        layers,
        schedule=parts["schedule"],
        importance=parts["importance"],
        allocator=parts["allocator"],
        regularizer=parts["regularizer"],
        total_steps=total_steps,
        target=target,
        probe=losses["probe"],
        held_out=losses["held_out"],
        units=units,
        agree=world.agreed,
    )
    allocation.on_empty(lambda name: remove(model, name))
    optimizer = build_optimizer(model, layers, loaded.head_modules, config.train)
    masks = parts["adapter"].masks(layers, config.seed if world.is_main else world.seed(config.seed))
    session = Session(
        composed=composed,
        model=model,
        tokenizer=loaded.tokenizer,
        task=task,
        encoded=encoded,
        rows=rows,
        head_modules=loaded.head_modules,
        source=config.model.name if config.model.name.startswith("package://") else loaded.source,
        quantised=loaded.quantised,
        new_tokens=loaded.new_tokens,
        token_rows=token_rows,
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
        stream=stream,
        masks=masks,
        siblings=[],
        notes=start.notes if start is not None else (),
        world=world,
        sharded=sharded,
        own_random=None if world.alone else OwnRandom(device, world.seed(config.seed)),
        origin=origin,
        hollow=loaded.hollow,
    )
    if not splits and not loaded.hollow:
        join_siblings(session)
    return session


def join_siblings(session: Session) -> None:
    """Find layers that can be computed together, by a forward pass; of a sharded base a matter of all processes."""
    first = first_row(session.model, session.task, session.encoded["train"], session.device, session.autocast_dtype)
    if not session.config.train.compile:
        session.siblings = list(join(session.layers, first).values())


def _stream(task: Task, tokenizer: Any, rows: Rows, config: Config, world: World) -> BatchStream:
    def encode(part: Rows) -> Encoded:
        task.fit(part)
        encoded = task.encode(part.splits["train"], tokenizer)
        return pack(encoded, config.data.max_length) if config.data.packing else encoded

    train = config.train
    unread = (train.log_every + 1) * train.accumulation  # the loop asks about batches since the last log at most
    return BatchStream(rows, encode, batch_size=train.batch_size, seed=config.seed, remember=unread, world=world)


def _token_rows(model: nn.Module, new: NewTokens | None, targets: Sequence[str]) -> dict[str, TokenRows]:
    if new is None:
        return {}
    if new.output in targets:
        raise UserError(
            f"adapter.targets: '{new.output}' has an adapter, and model.add_tokens trains rows of it",
            hint="leave one of the two out",
        )
    return train_rows(model, new.embedding, new.output, new.ids)


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass; transformers renamed the switch in 5.23."""
    model.config.use_cache = False  # BART's encoder asks the configuration alone, and would say that this can't be
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def lower(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold what does not train in the type that it is multiplied in, at half the memory; what trains is in float32.

    All of a module of which anything trains is: a layer norm takes no weight and bias of two types.
    """
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        kind = torch.float32 if any(p.requires_grad for p in own) else dtype
        for parameter in own:
            packed = is_packed(module) and parameter is module.weight
            if parameter.is_floating_point() and not packed:
                parameter.data = parameter.data.to(kind)
