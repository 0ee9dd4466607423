"""How large a run is: the budget as asked, what it comes to for these modules, and what can be refused early."""

from typing import Any

from torch import nn

from dora_cli.adapters.base import linear_shape
from dora_cli.allocation.budget import PAPER_RATIO, Budget, Target, check_reachable, parse_budget, resolve, spread
from dora_cli.errors import UserError
from dora_cli.models.targets import find_targets


def check_values(composed: Any, budget: Budget | None) -> None:
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
    wanted, rank = getattr(parts["regularizer"], "target_rank", None), getattr(parts["adapter"], "rank", None)
    if wanted is not None and rank is not None and wanted > rank:
        raise UserError(
            f"regularizer.target_rank={wanted:g} lies above the start, adapter.rank={rank}: no gate would ever close",
            hint="lower regularizer.target_rank, or raise adapter.rank",
        )
    if rank is not None and composed.origin.get("allocator.start_ratio", "") is None:
        raise UserError(
            f"allocator.start_ratio has no effect: adapter.rank={rank} says where the adapter starts",
            hint="leave out one of them",
        )
    _refuse_idle(composed, budget)
    if config.model.add_tokens and parts["adapter"].export not in ("lora", "decomposed"):
        raise UserError(
            f"model.add_tokens: method={composed.method} is saved in a form that has no place for new embeddings",
            hint="choose a method that is saved as a LoRA, such as method=dora or method=lora",
        )
    if config.export == "uniform" and parts["adapter"].export not in ("lora", "decomposed"):
        raise UserError(
            f"export=uniform: the update of method={composed.method} is no pair of low-rank factors",
            where="servers read low-rank adapters only",
            hint="merge it: save.merged=true writes RUN/merged, or use dora-merge checkpoint=RUN out=DIR afterwards",
        )


def asked_budget(composed: Any) -> Budget | None:
    """The budget as asked, or None where the method has none or finds it; refused early where it can't be read."""
    budget = parse_budget(composed.config.budget)
    adapter = composed.parts["adapter"]
    if not adapter.budgeted:
        return None
    if composed.parts["schedule"].finds_budget:
        _check_found(composed, budget)
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


def budget_word(composed: Any) -> Any:
    """What names and records say of the budget: as asked, ``auto`` where the run finds it, None where there is none."""
    if not composed.parts["adapter"].budgeted:
        return None
    return "auto" if composed.parts["schedule"].finds_budget else composed.config.budget


def _refuse_idle(composed: Any, budget: Budget | None) -> None:
    """Options that were typed and that this schedule or this kind of budget never asks for."""
    found = composed.parts["schedule"].finds_budget
    if found and composed.origin.get("allocator.revive", "") is None:
        raise UserError(
            "allocator.revive has no effect with schedule=auto",
            where="what a trial cuts comes back if it is missed, and never after that",
            hint="leave it out, or set a budget and another schedule, such as cubic_late",
        )
    in_parameters = budget is not None and budget.kind == "params"
    if not in_parameters and composed.origin.get("allocator.cost_aware", "") is None:
        said = "schedule=auto" if found else f"budget={budget.text if budget else None}"
        raise UserError(
            f"allocator.cost_aware has no effect: {said} counts components",
            hint="leave it out" if found else "leave it out, or say the budget in parameters, such as budget=340k",
        )


def _check_found(composed: Any, budget: Budget | None) -> None:
    """A budget of a recipe's may say where the adapter starts; one that is typed was meant."""
    rank = composed.parts["adapter"].rank
    if budget is not None and composed.origin.get("budget", "") is None:
        raise UserError(
            f"budget={budget.text} and schedule=auto contradict each other: the run finds its budget",
            hint="leave out one of them; schedule.floor=N says how few components may be left, adapter.rank=N how many "
            "each module starts with",
        )
    if rank is None and (budget is None or budget.kind == "share"):
        raise UserError("schedule=auto: nothing says how large the adapter starts", hint="set adapter.rank=12")


def sized_targets(
    composed: Any, model: nn.Module, head_modules: list[str], budget: Budget | None
) -> tuple[list[str], list[int], Target | None]:
    """Names of the target modules, their ranks at the start, and the resolved budget."""
    adapter, allocator = composed.parts["adapter"], composed.parts["allocator"]
    if not adapter.wraps:
        return [], [], None
    names = find_targets(model, adapter.targets, exclude=head_modules)
    costs = [adapter.unit_cost(*linear_shape(model.get_submodule(name))) for name in names]
    if budget is None:
        rank = adapter.rank
        if rank is None:  # the run finds its budget, and the recipe's says where it starts
            rank = parse_budget(composed.config.budget).start_rank(costs, start_ratio(allocator))  # type: ignore[union-attr]
        return names, [rank] * len(names), None
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
    rank = adapter.rank if adapter.rank is not None else budget.start_rank(costs, start_ratio(allocator))
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


def start_ratio(allocator: Any) -> float:
    """Start rank over the average rank asked for, where ``adapter.rank`` does not say the start."""
    return float(getattr(allocator, "start_ratio", PAPER_RATIO))
