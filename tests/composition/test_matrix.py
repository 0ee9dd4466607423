"""Every valid combination of parts trains, saves, comes back in a new object, and merges, with the same logits."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_cli.adapters import ADAPTERS
from dora_cli.adapters.init import INITS
from dora_cli.allocation import ALLOCATORS, IMPORTANCES, REGULARIZERS, SCHEDULES, rules
from dora_cli.allocation.trials import Trials
from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.apply import apply_adapter
from dora_cli.checkpoints.merge import merge
from dora_cli.errors import UserError
from dora_cli.registry import load

VALID = [names for names, outcome in rules.combinations() if isinstance(outcome, str)]
REFUSED = [names for names, outcome in rules.combinations() if isinstance(outcome, UserError)]


def identifier(names: dict[str, str]) -> str:
    return "-".join(names[group] for group in ("adapter", "importance", "allocator"))


def covering(combinations: list[dict[str, str]]) -> list[dict[str, str]]:
    """A few that hold every part, and every valid pair of an adapter and a way to move its units, at least once.

    How an adapter's units are moved depends on the allocator's mode; static ones have nothing in common.
    """
    modes = {name: load(ALLOCATORS, name, key="").mode for name in ALLOCATORS}

    def held(names: dict[str, str]) -> set[tuple[str, str]]:
        allocator = names["allocator"]
        mode = allocator if modes[allocator] == "static" else modes[allocator]
        return {(names["adapter"], mode), ("allocator", allocator), ("importance", names["importance"])}

    missing = set().union(*map(held, combinations))
    times: Counter[str] = Counter()  # each importance has been taken
    chosen = []
    while missing:
        chosen.append(max(combinations, key=lambda n: (len(held(n) & missing), -times[n["importance"]])))
        missing -= held(chosen[-1])
        times[chosen[-1]["importance"]] += 1
    return chosen


FAST = covering(VALID)
LOUD = "adapter.alpha=64"  # for gated: its factors start at 0.02², too small to be seen in ten steps
SLOW = [names for names in VALID if names not in FAST]


def overrides(names: dict[str, str]) -> list[str]:
    """A combination as a user would ask for it, with a schedule that the allocator accepts."""
    adapter, allocator = load(ADAPTERS, names["adapter"], key=""), load(ALLOCATORS, names["allocator"], key="")
    words = [f"{group}={names[group]}" for group in ("adapter", "importance", "allocator")]
    if allocator.scores:
        interval = 6 if names["importance"] == "ablation" else 2  # two forward passes per component and event
        words += [f"allocator.interval={interval}", "schedule.start=2", "schedule.end=8"]
        words += ["schedule=constant" if allocator.mode == "constant" else "schedule=linear"]
    if adapter.budgeted:
        words += ["budget=r2"] + (["adapter.rank=4"] if allocator.mode == "shrink" else [])
    if names["adapter"] == "gated":
        words.append(LOUD)
    if names["allocator"] == "soft_threshold":
        words.append("allocator.threshold=1e-4")
    return words


def check_round_trip(trained: Any) -> None:
    if trained.session.layers:
        assert (trained.logits - trained.base_logits()).abs().max() > 5e-5  # more than rounding to bring back
    fresh = trained.fresh_model()
    apply_adapter(fresh, read_adapter(trained.out))
    assert torch.allclose(trained.logits_of(fresh), trained.logits, atol=1e-5)

    from transformers import AutoModelForSequenceClassification

    merge(trained.out / "adapter", trained.out / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(trained.out / "merged")
    assert torch.allclose(trained.logits_of(merged), trained.logits, atol=1e-5)


def check_peft(trained: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    served = PeftModel.from_pretrained(trained.fresh_model(), str(trained.out / "adapter"))
    assert torch.allclose(trained.logits_of(served), trained.logits, atol=1e-5)


def check_combination(run: Callable[..., Any], names: dict[str, str], tmp_path: Path) -> None:
    trained = run(*overrides(names))
    session = trained.session
    allocation = session.allocation
    if session.budget is not None and allocation.table.kind == "components":
        alive = allocation.alive_count()
        # PEFT's and the official code's own counts may cut more where scores tie; nobody may leave more.
        assert alive <= 2 * len(session.targets)
        assert alive == 2 * len(session.targets) or "official" in names["allocator"] or "peft" in names["allocator"]
    check_round_trip(trained)
    if session.composed.parts["adapter"].export in ("lora", "decomposed"):
        check_peft(trained, tmp_path)


@pytest.mark.parametrize("names", FAST, ids=identifier)
def test_a_combination_trains_saves_comes_back_and_merges(run: Any, names: dict[str, str], tmp_path: Path) -> None:
    check_combination(run, names, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("names", SLOW, ids=identifier)
def test_every_other_combination_does_too(run: Any, names: dict[str, str], tmp_path: Path) -> None:
    check_combination(run, names, tmp_path)


@pytest.mark.covering(1)
@pytest.mark.parametrize("budget", ["r0.5", "900"])
@pytest.mark.parametrize("method", ["dora", "adalora", "alora", "elalora", "increlora", "sora", "weight_decomposed"])
def test_small_and_parameter_budgets_are_met_by_every_kind_of_method(run: Any, method: str, budget: str) -> None:
    """Below one component a module some start with none, which must not hurt those that gain later."""
    if method == "increlora" and budget == "r0.5":
        budget = "r2.5"  # it starts at 1
    if method == "increlora":
        budget = {"900": "2000"}.get(budget, budget)
    options = [] if method == "weight_decomposed" else ["schedule.end=8"]
    options += [] if method in ("weight_decomposed", "sora") else ["schedule.start=2", "allocator.interval=2"]
    options += ["adapter.alpha=32"] if method == "elalora" else []
    options += ["allocator.threshold=1e-4"] if method == "sora" else []
    trained = run(f"method={method}", f"budget={budget}", *options)
    allocation, n = trained.session.allocation, len(trained.session.targets)
    if budget.startswith("r"):
        assert allocation.alive_count() == round(float(budget[1:]) * n)
    else:
        cheapest = int(allocation.table.cost.min())
        assert int(budget) - 2 * cheapest < allocation.table.alive_cost() <= int(budget)
    assert max(float(layer.delta_weight().norm()) for layer in trained.session.layers.values()) < 100
    check_round_trip(trained)


def test_the_fast_ones_hold_every_part() -> None:
    assert {n["adapter"] for n in FAST} == set(ADAPTERS)
    assert {n["importance"] for n in FAST} == set(IMPORTANCES)
    assert {n["allocator"] for n in FAST} == set(ALLOCATORS)


def with_components(regularizer: str, start: str) -> list[str]:
    """The adapters of components that have what both need: none where a start and a regularizer do not go together."""
    needs = load(REGULARIZERS, regularizer, key="").needs
    needs |= load(INITS, start, key="").needs if start != "default" else frozenset()
    parts = {n: load(ADAPTERS, n, key="") for n in ADAPTERS}
    return [n for n, part in parts.items() if needs <= part.provides and part.verbs and "components" in part.units]


def pairwise() -> list[Any]:
    """(schedule, regularizer, start, adapter) such that every pair of a schedule, a regularizer and a start is there.

    But for a start that does not go with a regularizer: the next one that does stands in.

    Those that hold a schedule for the first time are fast ones.
    """
    moving = [n for n in SCHEDULES if load(SCHEDULES, n, key="").moves]
    regularizers = [n for n in REGULARIZERS if "components" in load(REGULARIZERS, n, key="").units]
    starts = ["default", *INITS]
    cases = []
    for i, schedule in enumerate(moving):
        for k, regularizer in enumerate(regularizers):
            turned = [starts[(i + k + n) % len(starts)] for n in range(len(starts))]
            start, adapters = next((s, a) for s in turned if (a := with_components(regularizer, s)))
            case = (schedule, regularizer, start, adapters[(i + k) % len(adapters)])
            cases.append(case if k == i % len(regularizers) else pytest.param(*case, marks=pytest.mark.slow))
    return cases


@pytest.mark.parametrize(("schedule", "regularizer", "start", "adapter"), pairwise())
def test_schedules_regularizers_and_starts_go_together(
    run: Any, schedule: str, regularizer: str, start: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trials, "learned", True)  # in eight steps nothing is, and then nothing is tried
    trained = run(
        f"adapter={adapter}",
        f"adapter.init={start}",
        "importance=component_norm",
        "allocator=prune",
        f"schedule={schedule}",
        f"regularizer={regularizer}",
        *([] if schedule == "one_shot" else ["schedule.start=1"]),
        "schedule.end=7",
        "allocator.interval=2",
        "adapter.rank=4",
        *([LOUD] if (adapter, start) == ("gated", "default") else []),
        # A search that keeps every cut comes to the same, one for each of the 12 modules.
        *(["schedule.tolerance=9", "schedule.cut=0.5", "schedule.floor=12"] if schedule == "auto" else ["budget=r1"]),
    )
    assert trained.session.allocation.alive_count() == len(trained.session.targets)
    check_round_trip(trained)


STARTS = [
    (init, adapter)
    for init in INITS
    for adapter in ADAPTERS
    if hasattr(load(ADAPTERS, adapter, key=""), "start")
    and load(INITS, init, key="").needs <= load(ADAPTERS, adapter, key="").provides
]


# Those that hold a start or an adapter for the first time are fast ones.
NEW = [
    pair
    for k, pair in enumerate(STARTS)
    if pair[0] not in {i for i, _ in STARTS[:k]} or pair[1] not in {a for _, a in STARTS[:k]}
]


@pytest.mark.parametrize(
    ("init", "adapter"), [p if p in NEW[::2] else pytest.param(*p, marks=pytest.mark.slow) for p in STARTS]
)
def test_every_start_goes_with_every_adapter_that_provides_for_it(run: Any, init: str, adapter: str) -> None:
    prunable = "components" in load(ADAPTERS, adapter, key="").units
    chosen = (
        ["importance=random", "allocator=prune", "allocator.interval=2", "schedule=linear", "adapter.rank=4"]
        if prunable
        else []
    )
    trained = run(f"adapter={adapter}", f"adapter.init={init}", "budget=r2", *chosen)
    check_round_trip(trained)


@pytest.mark.parametrize(
    "names",
    [pytest.param(REFUSED[i], marks=[pytest.mark.slow] * (i % 2)) for i in range(0, len(REFUSED), 47)],
    ids=identifier,
)
def test_refusals_come_before_any_model_loads_and_say_what_would_work(
    run: Any, names: dict[str, str], tmp_path: Path
) -> None:
    words = [f"{g}={names[g]}" for g in ("adapter", "importance", "allocator")]
    moves = load(ALLOCATORS, names["allocator"], key="").mode != "constant" and names["allocator"] != "none"
    with pytest.raises(UserError) as error:
        run(*words, f"schedule={'linear' if moves else 'constant'}", "model.name=/nowhere", "data.path=/nowhere")
    assert any(names[g] in error.value.message for g in ("adapter", "importance", "allocator"))
    assert error.value.hint
    assert not (tmp_path / "run").exists()
