"""What is likely wrong with a plan: nothing that stops a run, but what its owner may not have meant."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import ceil

from dora_cli.training.facts import Facts, counted

FAR = 3  # times the tuned rate, or a third of it
# Peak rates of AdamW that are in use, by adapter; those that wrap layers have the first.
USUAL = {"": (5e-5, 1e-2), "aflora": (5e-4, 5e-2), "full": (1e-6, 2e-4), "none": (1e-4, 1e-1)}
LEFT = 0.1  # of the run, at least, for what lives after the final choice
CUT = 0.25  # of the training rows, at most, longer than data.max_length
SHORT, OFTEN = 50, 5  # steps; in shorter runs nobody minds that each few are saved
FORWARD = 1 / 3  # of what a row costs in training, a row costs in evaluation


@dataclass(frozen=True)
class Doubt:
    """One warning: the ``key`` that it is about, ``what`` is likely wrong with the numbers, ``advice`` what to set."""

    key: str
    what: str
    advice: str


def doubts(known: Facts) -> list[Doubt]:
    """All warnings about a plan, in the order of its sections."""
    return list(chain(_lengths(known), _budget(known), _window(known), _rate(known), _pace(known)))


def _lengths(known: Facts) -> Iterator[Doubt]:
    data, positions = known["data"], known["model"]["max_positions"]
    if positions is not None and data["max_length"] > positions:
        yield Doubt(
            "data.max_length",
            f"data.max_length={data['max_length']} is more than the {positions:,} positions that the model was made "
            "for, and beyond them it is not to be trusted",
            f"set data.max_length={positions} or less",
        )
    train = known["data"]["splits"]["train"]
    may_grow = positions is None or data["max_length"] < positions
    if may_grow and train["truncated"] > CUT * train["batch_rows"]:
        yield Doubt(
            "data.max_length",
            f"{train['truncated']:,} of {train['batch_rows']:,} training rows are longer than "
            f"data.max_length={data['max_length']} tokens, and lose what is beyond",
            f"raise data.max_length{f' (the model takes {positions:,})' if positions else ''}",
        )


def _budget(known: Facts) -> Iterator[Doubt]:
    units, n = known["adapter"]["units_end"][1], sum(len(group["names"]) for group in known["modules"])
    if known["adapter"]["unit"] == "components" and known["run"]["budget"] is not None and units < n:
        yield Doubt(
            "budget",
            f"budget={known['run']['budget']} leaves {units:,} components for {n:,} modules, so {n - units:,} of them "
            "at least end without any",
            "set budget=r1 or more, or adapt fewer modules by adapter.targets",
        )


def _window(known: Facts) -> Iterator[Doubt]:
    schedule = known["schedule"]
    if schedule is None:
        return
    warmup, moves = known["training"]["warmup_steps"], schedule["mode"] == "constant"  # units do, their number doesn't
    begin = next((step for step, count in schedule["events"] if moves or count != schedule["first"]), warmup)
    if begin < warmup and not schedule["preset_start"]:
        acting = {"shrink": "pruning", "grow": "growth"}.get(schedule["mode"], "allocation")
        acting = "freezing" if schedule["counts"] == "tensors" else acting
        yield Doubt(
            "schedule.start",
            f"{acting} starts at step {begin}, before the learning rate is warm (step {warmup})",
            "raise schedule.start, or lower train.warmup",
        )
    if schedule["mode"] not in ("shrink", "grow"):
        return
    end, total = schedule["end"], schedule["steps"]
    if total - end < LEFT * total:
        left = total - end
        yield Doubt(
            "schedule.end",
            f"the final choice falls on step {end:,} of {total:,}: what lives then trains for "
            f"{counted(left, 'step')} more ({left / total:.0%} of the run)",
            "set schedule.end=0.5, or train for longer",
        )
    if len(schedule["events"]) == 1 and not schedule["one_event"]:
        decided = "nothing can be tried" if schedule.get("found") else "all is decided at once"
        first = max(1, schedule["start"])  # there is no step 0
        if first == end:
            yield Doubt(
                "schedule.end",
                f"the window of allocation is step {end} alone: {decided}",
                "set schedule.start and schedule.end further apart, or train for longer",
            )
            return
        yield Doubt(
            "allocator.interval",
            f"allocator.interval={schedule['interval']} leaves one allocation event in the window, steps "
            f"{first} to {end}: {decided}",
            f"set allocator.interval={max(1, (end - first) // 10)}, or train for longer",
        )


def _rate(known: Facts) -> Iterator[Doubt]:
    rate, tuned = known["training"]["learning_rate"], known["training"]["tuned_learning_rate"]
    run, data = known["run"], known["data"]["choice"]
    if isinstance(tuned, float):
        if not tuned / FAR < rate < tuned * FAR:
            yield Doubt(
                "train.learning_rate",
                f"train.learning_rate={rate:g} is {_times(rate, tuned)} the {tuned:g} that was tuned for "
                f"method={run['method']} on data={data}",
                f"set train.learning_rate={tuned:g}, or leave it out",
            )
        return
    low, high = USUAL.get(run["parts"]["adapter"], USUAL[""])
    if not low <= rate <= high:
        yield Doubt(
            "train.learning_rate",
            f"train.learning_rate={rate:g} lies outside of what is usual for adapter={run['parts']['adapter']}, "
            f"{low:g} to {high:g}",
            "try a few values in that range (-m train.learning_rate=…,…)",
        )


def _times(rate: float, tuned: float) -> str:
    return f"{rate / tuned:.3g} times" if rate > tuned else f"1/{tuned / rate:.3g} of"


def _pace(known: Facts) -> Iterator[Doubt]:
    training, splits = known["training"], known["data"]["splits"]
    total, warmup = training["steps"], training["warmup_steps"]
    if warmup >= total:
        yield Doubt(
            "train.warmup",
            f"the warm-up of {counted(warmup, 'step')} is no shorter than the run, {counted(total, 'step')}: the "
            "learning rate never falls, and hardly reaches its peak",
            "set train.warmup=0.06, a share of the run",
        )
    rows = sum(split["batch_rows"] for role, split in splits.items() if role != "train")
    times, trained = ceil(total / training["evaluate_every"]), total * training["rows_per_step"]
    if rows * times * FORWARD > trained:
        yield Doubt(
            "train.eval_every",
            f"{counted(times, 'evaluation')} of {counted(rows, 'row')} take{'s' if times == 1 else ''} longer than "
            f"the training, which sees {counted(trained, 'row')}",
            "raise train.eval_every, or set data.max_eval_samples",
        )
    if total >= SHORT and training["save_every"] < OFTEN:
        every = "step" if training["save_every"] == 1 else f"{training['save_every']} steps"
        yield Doubt(
            "train.save_every",
            f"a checkpoint is written every {every}, {total // training['save_every']:,} in all",
            "raise train.save_every",
        )
