"""The plan in numbers: what ``dry_run=json`` prints, and what the plan's tables and plot are drawn from."""

import math
import re
from typing import Any

import torch

from dora_cli.adapters.base import AdapterLayer, linear_shape
from dora_cli.allocation.growth import component_cost
from dora_cli.models.load import position_limit
from dora_cli.models.quantised import weight_count
from dora_cli.training.loop import every_steps
from dora_cli.training.optim import warmup_steps
from dora_cli.training.setup import Session
from dora_cli.training.sizing import budget_word

Facts = dict[str, Any]
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer, in a module's name


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def facts(session: Session, out: str) -> Facts:
    """What is known of the run before it starts, as JSON can hold it (docs/formats.md says which keys)."""
    return {
        "run": _run(session, out),
        "data": _data(session),
        "model": _model(session),
        "modules": modules(session),
        "adapter": _adapter(session),
        "schedule": _schedule(session) if session.allocation.allocator.scores else None,
        "training": _training(session),
    }


def _run(session: Session, out: str) -> Facts:
    composed, config = session.composed, session.config
    return {
        "recipe": composed.recipe,
        "method": composed.method,
        "parts": dict(composed.names),
        "budget": budget_word(composed),
        "seed": config.seed,
        "out": out,
        "device": str(session.device),
        "precision": config.train.precision,
        "processes": session.world.size,
        "sharded": session.sharded,
    }


def _data(session: Session) -> Facts:
    data = session.config.data
    splits = {
        role: {
            "rows": len(rows) if rows.windows_of is None else rows.windows_of,
            "batch_rows": len(rows),  # windows of rows, where long ones are cut into several
            "truncated": rows.truncated,
        }
        for role, rows in session.encoded.items()
    }
    return {
        "choice": session.composed.data,
        "task": data.task,
        "max_length": data.max_length,
        "streamed": session.stream is not None,
        "splits": splits,
    }


def _model(session: Session) -> Facts:
    heads = [session.model.get_submodule(name) for name in session.head_modules]
    return {
        "name": session.config.model.name,
        "parameters": weight_count(session.model) - adapter_parameters(session),
        "quantization": session.quantised.kind if session.quantised is not None else None,
        "max_positions": max_positions(session),
        "head": list(session.head_modules),
        "head_parameters": sum(p.numel() for head in heads for p in head.parameters()),
        "weights_here": not session.hollow,
    }


def adapter_parameters(session: Session) -> int:
    return sum(p.numel() for layer in session.layers.values() for p in layer.adapter_parameters().values())


def max_positions(session: Session) -> int | None:
    """The longest input that the model can take, by its learned positions, or was made for, by its configuration."""
    limit = position_limit(session.model)
    if limit is not None:
        return limit
    config: Any = session.model.config
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def modules(session: Session) -> list[Facts]:
    """The target modules, those grouped whose names differ by a layer's number alone, with what each starts with."""
    table = session.allocation.table
    units = torch.bincount(table.module, minlength=len(table.names)).tolist()
    cost = torch.bincount(table.module, weights=table.cost.double().cpu(), minlength=len(table.names)).tolist()
    start = {name: (units[i], round(cost[i])) for i, name in enumerate(table.names)}
    groups: dict[tuple[str, int, int], Facts] = {}
    for name in session.targets:
        module = session.model.get_submodule(name)
        d_out, d_in = linear_shape(module.base_layer if isinstance(module, AdapterLayer) else module)
        key = NUMBER.sub("*", name), d_out, d_in
        new = {"pattern": key[0], "shape": [d_out, d_in], "names": [], "units": [], "parameters": []}
        group = groups.setdefault(key, new)
        n, parameters = start.get(name, (0, 0))
        group["names"].append(name)
        group["units"].append(n)
        group["parameters"].append(parameters)
    return list(groups.values())


def _adapter(session: Session) -> Facts:
    """Units and parameters at the start and at the end: the end as the least and the most it can be."""
    allocation = session.allocation
    found = {
        "unit": allocation.table.kind if session.layers else "none",
        "units_start": allocation.start_count,
        "parameters_start": allocation.start_cost,
        "units_end": [allocation.start_count] * 2,
        "parameters_end": [allocation.start_cost] * 2,
        "trained_start": sum(p.numel() for p in session.trained_parameters().values()),
    }
    allocator, layers = allocation.allocator, session.layers.values()
    if layers and allocator.mode != "static":
        costs = [component_cost(layer) for layer in layers] if allocator.grows else allocation.table.cost.tolist()
        found_by_trial = allocation.schedule.finds_budget
        last = allocation.counts(_events(session))[-1] if found_by_trial else allocation.last
        units, parameters = end_bounds(last, sorted(costs), allocation.by_cost, allocator.grows)
        if allocator.mode == "constant" and not allocator.restores(units[1], len(layers)):
            units[0], parameters[0] = 1, min(costs)
        if found_by_trial:  # as few as that, if every cut is kept, or all
            units[1], parameters[1] = allocation.start_count, allocation.start_cost
        found |= {"units_end": units, "parameters_end": parameters}
    return found


def end_bounds(last: int, costs: list[int], by_cost: bool, grows: bool) -> tuple[list[int], list[int]]:
    """Least and most units, and least and most parameters, that a budget can leave.

    Args:
        last: the budget, in units or (``by_cost``) in parameters at most.
        costs: parameters of each unit at the start, rising; where the adapter grows, of one in each module.
        by_cost: what ``last`` counts.
        grows: whether there may be more units of one cost than there are in ``costs``.
    """
    if by_cost:
        least = max(last - costs[-1] + 1, 0)  # a unit more, even the dearest, would not have been left out
        most = last // costs[0]
        return [math.ceil(least / costs[-1]), most if grows else min(most, len(costs))], [least, last]
    if grows:
        return [last, last], [last * costs[0], last * costs[-1]]
    return [last, last], [sum(costs[:last]), sum(costs[len(costs) - last :])]


def _events(session: Session) -> list[int]:
    """The steps after which something is chosen."""
    return [t for t in range(1, session.allocation.window.end + 1) if session.allocation.is_event(t)]


def _schedule(session: Session) -> Facts:
    allocation = session.allocation
    window = allocation.window
    steps = _events(session)
    counts = allocation.counts(steps)
    preset = session.composed.preset
    starts = {"schedule.start": allocation.schedule.start, "train.warmup": session.config.train.warmup}
    return {
        "mode": allocation.allocator.mode,
        "counts": "parameters" if allocation.by_cost else allocation.table.kind,
        "preset_start": starts.items() <= preset.items(),
        "start": window.start,
        "end": window.end,
        "steps": window.total,
        "first": allocation.first,
        "last": allocation.last,
        "interval": allocation.allocator.interval,
        "one_event": allocation.schedule.one_event,
        "events": [[t, count] for t, count in zip(steps, counts, strict=True)],
        "found": _found(allocation.schedule, session) if allocation.schedule.finds_budget else None,
    }


def _found(schedule: Any, session: Session) -> Facts:
    """By what a budget is found that nobody has said."""
    rows = min(schedule.rows, len(session.encoded["validation"]))
    return {"tolerance": schedule.tolerance, "cut": schedule.cut, "rows": rows}


def _training(session: Session) -> Facts:
    train, per_epoch = session.config.train, session.steps_per_epoch
    return {
        "steps": session.total_steps,
        "steps_per_epoch": per_epoch,
        "epochs": session.total_steps / per_epoch if per_epoch is not None else None,
        "rows_per_step": train.batch_size * train.accumulation,
        "learning_rate": train.learning_rate,
        "head_learning_rate": train.head_learning_rate,
        "tuned_learning_rate": session.composed.tuned.get("train.learning_rate"),
        "scheduler": train.scheduler,
        "warmup_steps": warmup_steps(train.warmup, session.total_steps),
        "weight_decay": train.weight_decay,
        "clip_norm": train.clip_norm,
        "evaluate_every": every_steps(train.eval_every, session.total_steps, per_epoch),
        "save_every": every_steps(train.save_every, session.total_steps, per_epoch),
    }
