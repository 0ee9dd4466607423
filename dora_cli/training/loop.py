"""The training loop: fetch, forward and backward, allocate, step, and only when due log, evaluate and save."""

import math
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from dora_cli.allocation.verdict import Verdict
from dora_cli.data.choices import CHOICES
from dora_cli.data.encoded import Encoded
from dora_cli.errors import UserError
from dora_cli.modes import autocast, evaluating
from dora_cli.training.optim import optimizer_step
from dora_cli.training.parallel import add_up
from dora_cli.training.setup import Batch, Session
from dora_cli.training.state import Progress

SKIPPED = "skipped"  # the "split" of steps that were not taken


@dataclass
class Hooks:
    """What the loop needs of other rooms, handed in by ``cli``.

    ``evaluate() → {split: {metric: value}}``, ``export(record)`` writes the weights as they are as the run's result,
    ``save()`` writes a checkpoint, ``log``, ``event`` and ``skipped`` take one record each, ``stop() → name of a signal
    or None``.
    """

    evaluate: Callable[[], dict[str, dict[str, float]]]
    export: Callable[[dict[str, Any]], None]
    save: Callable[[], None]
    log: Callable[[dict[str, Any]], None]
    event: Callable[[dict[str, Any]], None]
    skipped: Callable[[dict[str, Any]], None]
    evaluated: Callable[[dict[str, Any], bool], None]
    stop: Callable[[], str | None]


def train(session: Session, progress: Progress, hooks: Hooks) -> str | None:
    """Run from ``progress.step`` to the end, keeping ``progress`` up to date.

    Returns:
        None when the run is complete, or the name of the signal that ended it after a checkpoint.
    """
    config, model, task, device = session.config.train, session.model, session.task, session.device
    total, accumulation = session.total_steps, config.accumulation
    evaluate_every = every_steps(config.eval_every, total, session.steps_per_epoch)
    save_every = every_steps(config.save_every, total, session.steps_per_epoch)
    stream = session.micro_batches(progress.step * accumulation)
    meter = _Meter(device, progress)
    # torch says so where the very first step is skipped; the rate goes by the step's number, taken or not.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
    model.train()

    for step in range(progress.step + 1, total + 1):
        # The number of rows (or tokens) that the loss averages over must be known before the first backward.
        micro_batches = [next(stream) for _ in range(accumulation)]
        count, asked = _together(session, [batch for batch, counts in micro_batches if counts], meter, hooks)
        step_loss = torch.zeros(1, device=device)
        with session.own_random.drawn() if session.own_random is not None else nullcontext():
            for i, (batch, counts) in enumerate(micro_batches):
                if session.masks is not None:
                    session.masks.move(step, i)
                for siblings in session.siblings:
                    siblings.forget()
                batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
                with autocast(device, session.autocast_dtype):
                    loss = task.loss(session.forward, batch).total  # outputs must not live into the next forward pass
                loss = loss / count if counts else loss * 0.0
                loss.backward()
                step_loss += loss.detach()

        add_up(session.world, session.candidates(), [step_loss, *session.allocation.importance.partial_sums()])
        session.allocation.after_backward(step)
        # In the model's order, which freezing, thawing and resuming leave alone: the norm is then the same to the bit.
        trained = [p for p in session.candidates() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        step_loss = step_loss.squeeze(0)
        verdict = Verdict.of(step_loss + norm)  # what is not finite must never reach the weights
        if config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, config.clip_norm, norm)
        optimizer_step(session.optimizer, verdict)
        event = session.allocation.after_step(step, session.optimizer, verdict)
        learning_rate = float(session.scheduler.get_last_lr()[0])
        session.scheduler.step()
        session.optimizer.zero_grad(set_to_none=True)
        progress.step = step
        meter.step(step_loss, norm, sum(p.numel() for p in trained), verdict)

        logs, evaluates = (step % every == 0 or step == total for every in (config.log_every, evaluate_every))
        saves = step % save_every == 0
        # Then the host looks at numbers anyway; in other steps it goes ahead of the device.
        if verdict.known is not None or event is not None or logs or evaluates or saves:
            _count_skipped(session, progress, hooks, meter)
        if event is not None:
            hooks.event(event)
        if logs and progress.pending_steps:
            hooks.log(meter.record(step, learning_rate, session))
        stopping = hooks.stop() if session.world.alone else asked
        if evaluates:
            if _evaluate(session, progress, hooks):
                return None
            meter.restart_clock()
        if step == total:
            return None
        if saves or stopping:
            _count_skipped(session, progress, hooks, meter)
            meter.park()
            hooks.save()
            meter.restart_clock()
        if stopping:
            session.world.exchange([step])  # none leaves while the main one writes: torchrun would end that, too
            return stopping
    return None


def _together(session: Session, own: Sequence[Batch], meter: "_Meter", hooks: Hooks) -> tuple[int, str | None]:
    """Count a step's batches: these, and those of the other processes.

    Returns:
        What the loss of all of them is divided by, and the signal that one of several processes has been sent.
    """
    asked = hooks.stop()
    sizes = [(session.task.count(batch), *_size(batch)) for batch in own]
    mine = [sum(column) for column in zip((0, 0, 0), *sizes, strict=True)]
    told = session.world.exchange([*mine, signal.Signals[asked].value if asked else 0])
    *sums, signals = zip(*told, strict=True)
    count, samples, tokens = map(sum, sums)
    meter.count(samples, tokens)
    return count, signal.Signals(max(signals)).name if any(signals) else None


def _size(batch: Batch) -> tuple[int, int]:
    """Rows (a question is one, however many choices it has) and real tokens, read and to be written; on the CPU."""
    tokens = 0
    for mask in (batch["attention_mask"], batch.get("decoder_attention_mask")):
        tokens += 0 if mask is None else int(mask.sum())
    return len(batch.get(CHOICES, batch["input_ids"])), tokens


def _count_skipped(session: Session, progress: Progress, hooks: Hooks, meter: "_Meter") -> None:
    """Count the steps that changed nothing since this was last done, and say which of their rows are to blame.

    Raises:
        UserError: there is one too many.
    """
    for step, loss in meter.skipped():
        _blame(session, progress, hooks, step, loss)


def _blame(session: Session, progress: Progress, hooks: Hooks, step: int, loss: float) -> None:
    """One skipped step; rows are looked at under the weights as they are now."""
    most = session.config.train.max_skipped
    progress.skipped += 1
    what = "gradient" if math.isfinite(loss) else "loss"
    rows = session.rows_of(step)
    # One by one: a row with a broken label or value, among others that are fine.
    broken = [(block, row) for block, row in rows if not math.isfinite(_loss_of(session, block.encoded, row))]
    numbers, guilty = ([block.number(row) for block, row in some] for some in (rows, broken))
    hooks.skipped({"step": step, "split": SKIPPED, "what": what, "rows": numbers, "guilty": guilty})
    if progress.skipped <= most:
        return
    message = f"the {what} is not finite at step {step}, after {most} such steps that were skipped"
    slower = "lower train.learning_rate, or set train.clip_norm; earlier checkpoints are untouched"
    if not guilty:
        raise UserError(message, where=f"rows of train, each with a finite loss: {_brief(numbers)}", hint=slower)
    place = f"rows of train that have no finite loss by themselves: {_brief(guilty)} (from 0)\n"
    place += f"the first: {broken[0][0].where(broken[0][1])}"
    if session.config.data.packing:
        place += ", or a document that is packed with it"
    if len(guilty) == len(rows) and not math.isfinite(_loss_of(session, session.encoded["validation"], 0)):
        raise UserError(f"{message}: the run has diverged", where=place, hint=slower)
    raise UserError(
        message,
        where=place,
        hint=f"mend the data and start anew, or skip more: resume=true train.max_skipped={2 * most + 10}",
    )


def _brief(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")


def _loss_of(session: Session, encoded: Encoded, row: int) -> float:
    """The loss of one row under the weights as they are, in eval mode."""
    batch = {k: v.to(session.device) for k, v in encoded.batch([row]).items()}
    with evaluating(session.model), torch.no_grad(), autocast(session.device, session.autocast_dtype):
        return float(session.task.loss(session.model, batch).total)


def _evaluate(session: Session, progress: Progress, hooks: Hooks) -> bool:
    """Evaluate; after the final choice, also compare with the best. Returns whether to stop early."""
    splits = hooks.evaluate()
    _refuse_divergence(progress.step, splits["validation"]["loss"], "validation loss")
    name = session.task.metric_names[0]
    record: dict[str, Any] = {
        "step": progress.step,
        "name": name,
        "value": splits["validation"][name],
        "metrics": splits,
    }
    eligible = progress.step >= session.allocation.final_step
    better = eligible and (progress.best is None or _better(session, record["value"], progress.best["value"]))
    if eligible:
        progress.last = record
        progress.waited = 0 if better else progress.waited + 1
    if better:
        progress.best = record
    hooks.evaluated(record, better)
    last_is_wanted = session.config.save.which == "last"
    patience = session.config.train.patience
    ends = eligible and patience is not None and progress.waited >= patience
    at_the_end = ends or progress.step == session.total_steps
    if eligible and (at_the_end if last_is_wanted else better):
        hooks.export(record)
    return ends


def _refuse_divergence(step: int, loss: float, name: str) -> None:
    """Stop when the loss is no number any more: nothing trained from here on could be used.

    Raises:
        UserError: naming the step.
    """
    if not math.isfinite(loss):
        raise UserError(
            f"the {name} is {loss} at step {step}: the run has diverged",
            hint="lower train.learning_rate, or set train.clip_norm; earlier checkpoints are untouched",
        )


def _better(session: Session, new: float, old: float) -> bool:
    if new != new:  # NaN is never better
        return False
    return old != old or (new > old if session.task.higher_is_better else new < old)


def every_steps(value: int | float | None, total: int, epoch: int | None) -> int:
    """Steps between evaluations or checkpoints: as said, a share of the run, or an epoch; a tenth of the run where an
    epoch has no known length."""
    if value is None:
        return min(ceil(total / 10) if epoch is None else epoch, total)
    return max(1, int(value * total)) if value < 1 else int(value)


class _Meter:
    """Loss, throughput and time between two logs; asks the device for a number only when one is due."""

    def __init__(self, device: torch.device, progress: Progress) -> None:
        self.progress = progress
        self.loss = torch.tensor(progress.pending_loss, device=device)
        self.norm = torch.tensor(torch.nan, device=device)  # of the last step that was taken
        self.unread: list[tuple[int, int, Tensor, Verdict]] = []  # step, parameters that trained, loss, and whether
        self.since = time.perf_counter()
        self.samples_before, self.seconds_before = progress.samples, progress.seconds

    def count(self, samples: int, tokens: int) -> None:
        self.progress.samples += samples
        self.progress.tokens += tokens

    def step(self, loss: Tensor, norm: Tensor, trained: int, verdict: Verdict) -> None:
        """A step of ``trained`` parameters is over; it counts as taken until :meth:`skipped` has looked."""
        self.loss += verdict.choose(loss, 0.0)
        self.norm = verdict.choose(norm, self.norm)
        self.progress.pending_steps += 1
        self.progress.trained += trained
        self.unread.append((self.progress.step, trained, loss, verdict))
        now = time.perf_counter()
        self.progress.seconds += now - self.since
        self.since = now

    def skipped(self) -> list[tuple[int, float]]:
        """(step, loss) of those that were not taken since this was last asked."""
        unread, self.unread = self.unread, []
        known = [verdict.known for *_, verdict in unread]
        if None in known:
            known = torch.stack([verdict.finite for *_, verdict in unread if verdict.finite is not None]).tolist()
        found = [entry for entry, taken in zip(unread, known, strict=True) if not taken]
        self.progress.pending_steps -= len(found)
        self.progress.trained -= sum(trained for _, trained, *_ in found)
        return [(step, float(loss)) for step, _, loss, _ in found]

    def restart_clock(self) -> None:
        """Leave what has just been done out of the training time."""
        self.since = time.perf_counter()

    def park(self) -> None:
        """Put the loss of a half-logged stretch where a checkpoint finds it."""
        self.progress.pending_loss = float(self.loss)

    def record(self, step: int, learning_rate: float, session: Session) -> dict[str, Any]:
        progress = self.progress
        seconds = progress.seconds - self.seconds_before
        record: dict[str, Any] = {
            "step": step,
            "split": "train",
            "loss": float(self.loss) / max(progress.pending_steps, 1),
            "learning_rate": learning_rate,
            "samples_per_second": round((progress.samples - self.samples_before) / max(seconds, 1e-9), 1),
            "alive": session.allocation.alive_count(),
            "gradient_norm": float(self.norm),
        }
        if session.traffic is not None:
            record["traffic"] = session.traffic.training.total()  # bytes since the start
        regularizer = session.allocation.regularizer
        if regularizer.acts:
            record["regularizer"] = regularizer.value(session.allocation.table)
        self.loss.zero_()
        progress.pending_steps = 0
        self.samples_before, self.seconds_before = progress.samples, progress.seconds
        return record
