"""One training run: build, plan, train, write. Everything that the rooms may not know of each other meets here."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.apply import start_from
from dora_cli.checkpoints.atomic import atomic_write_text, sweep
from dora_cli.checkpoints.manifest import verify_if_listed
from dora_cli.checkpoints.merge import merge
from dora_cli.checkpoints.run_state import load_checkpoint, newest_checkpoint, put_back, save_checkpoint
from dora_cli.checkpoints.serving import serving_note
from dora_cli.cli import run_folder
from dora_cli.cli.console_run import logged_end, plan_text, print_plan
from dora_cli.cli.lock import locked
from dora_cli.cli.publish_run import require_hub, upload, write_run_cards
from dora_cli.cli.result_run import write_result
from dora_cli.cli.signals import EXIT_CODES, Signals
from dora_cli.cli.track_run import build_trackers, tracked
from dora_cli.config.compose import Composed
from dora_cli.config.schema import Config
from dora_cli.errors import UserError
from dora_cli.evaluation.predict import evaluate
from dora_cli.evaluation.scorers import build_scorer
from dora_cli.processes import ALONE, World
from dora_cli.reporting.events import ALLOCATION, MetricsFile, jsonable, read_events
from dora_cli.reporting.report import write_report
from dora_cli.reporting.runs import read_run
from dora_cli.reporting.terminal import View, show
from dora_cli.reporting.trackers.base import STOPPED
from dora_cli.reporting.trackers.base import check as check_trackers
from dora_cli.training.loop import Hooks, train
from dora_cli.training.parallel import agree
from dora_cli.training.plan import alive_word, describe
from dora_cli.training.setup import Begin, Session, build, join_siblings
from dora_cli.training.sizing import budget_word
from dora_cli.training.state import Progress, capture, restore
from dora_cli.training.summary import peaks, summarise


def run(composed: Composed, world: World = ALONE, built: Callable[[Session], object] | None = None) -> int:
    """Train as composed. Returns the exit code.

    Args:
        world: this process among those of the run; the main one alone looks into the run's folder, writes and prints.
        built: takes the session before anything is said or done with it.

    Raises:
        UserError: anything the user can put right; before the folder is made wherever that can be known.
    """
    config = composed.config
    if config.train.base == "apart" and built is None:
        raise UserError("train.base=apart is for a run by itself", hint="start each run of a sweep with torchrun")
    built = built or (lambda session: None)
    default = run_folder.default_out(composed.recipe, composed.method, budget_word(composed), config.seed)
    out = Path(config.out) if config.out else default
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if config.push_to_hub:
        name, private = config.push_to_hub, config.hub.private
        config.push_to_hub = world.on_main(lambda: require_hub(name, private, offline=config.offline))
    world.on_main(lambda: check_trackers(tracked(config.track), offline=config.offline))
    if config.dry_run:
        session = _ready(composed, None, world)
        built(session)
        if world.is_main:
            print_plan(describe(session, str(out)), config.dry_run)
        return 0
    with ExitStack() as stack:
        claim = _Claim(composed, out, stack)
        finished, resumes = world.on_main(claim.look)
        if finished:
            print(f"{out} is finished; nothing to resume")
            return _publish(config, out) if world.is_main else 0
        session = _ready(composed, claim.checkpoint if world.is_main else out if resumes else None, world)
        built(session)
        world.on_main(lambda: claim.take(session))
        progress = _restored(session, claim.checkpoint) if resumes else Progress()
        if not world.is_main:
            return _follow(session, progress)
        return _Run(session, out, claim.checkpoint, claim.messages, progress, claim.plan).go()


class _Claim:
    """A run's folder, looked at, and held for this process.

    Args:
        stack: what holds the folder until it is closed.
    """

    def __init__(self, composed: Composed, out: Path, stack: ExitStack) -> None:
        self.composed, self.out, self.stack = composed, out, stack
        self.there = self.held = False
        self.checkpoint: Path | None = None
        self.messages: list[str] = []
        self.plan = ""  # its text, for the log

    def look(self) -> tuple[bool, bool]:
        """Returns whether the run is finished already, and whether it goes on from a checkpoint.

        Raises:
            UserError: the folder can't be used.
        """
        config, out = self.composed.config, self.out
        run_folder.check_ours(out)
        if config.resume and run_folder.is_finished(out):
            return True, False
        self.there = run_folder.is_run(out)
        if self.there:
            self.held = self.stack.enter_context(locked(out))
        run_folder.check_free(out, resume=config.resume, overwrite=config.overwrite)
        if config.resume:
            self.checkpoint, self.messages = newest_checkpoint(out / run_folder.CHECKPOINTS)
        saved = (self.checkpoint or out) / run_folder.CONFIG  # the checkpoint's own copy is known to be whole
        if config.resume and saved.exists():
            text = saved.read_text(encoding="utf-8", errors="replace")
            run_folder.check_same(text, self.composed.yaml, saved)
        return False, self.checkpoint is not None

    def take(self, session: Session) -> None:
        """Say what is going to be done, and have the folder: it is made when all that can be known was looked at."""
        out = self.out
        plan = describe(session, str(out))
        self.plan = plan_text(plan)
        if self.checkpoint is None:  # who goes on has seen it
            print_plan(plan)
        if not self.there:
            out.mkdir(parents=True, exist_ok=True)
            self.held = self.stack.enter_context(locked(out))
            if run_folder.is_run(out):
                raise UserError(f"out={out} was taken by another process meanwhile", hint="choose another out=DIR")
        for folder in (out, out / run_folder.CHECKPOINTS):
            sweep(folder, everyone=self.held)  # of all that was being written when a process was killed here


def _ready(composed: Composed, checkpoint: Path | None, world: World) -> Session:
    """A session, the same in every process."""
    with world.together():
        session = _build(composed, checkpoint, world)
    agree(session)
    if session.sharded and not composed.config.dry_run:
        join_siblings(session)
    return session


def _build(composed: Composed, checkpoint: Path | None, world: World = ALONE) -> Session:
    if Path(composed.config.model.name).is_dir():
        verify_if_listed(composed.config.model.name)
    session = build(composed, None if checkpoint else _begin(composed), world)
    build_scorer(session.task)  # a wrong name, before the folder is made
    return session


def _begin(composed: Composed) -> Begin | None:
    """What ``adapter.init_from`` asks for; read now, so that a wrong folder is refused before a model loads."""
    folder = getattr(composed.parts["adapter"], "init_from", None)
    if folder is None:
        return None
    adapter = read_adapter(Path(expanduser(folder)))
    return lambda layers, model: start_from(layers, model, adapter)


def _restored(session: Session, checkpoint: Path | None) -> Progress:
    """Put a checkpoint, which the main process reads, back into every process's session."""
    world = session.world
    with world.together():
        tensors, rest = load_checkpoint(checkpoint) if checkpoint is not None else ({}, {})
    flat = {f"{stem}/{name}": tensor for stem, group in tensors.items() for name, tensor in group.items()}
    flat, rest = world.from_main(flat, {"state": rest, "stems": list(tensors)})
    whole: dict[str, dict[str, torch.Tensor]] = {stem: {} for stem in rest["stems"]}
    for key, tensor in flat.items():
        stem, _, name = key.partition("/")
        whole[stem][name] = tensor
    with world.together():
        progress = restore(session, whole, rest["state"])
    return progress


def _evaluated(session: Session) -> dict[str, dict[str, float]]:
    """Split → metric → value, of all but the training rows; every process has its share in it."""
    splits = {}
    for role, encoded in session.encoded.items():
        if role != "train":
            result = evaluate(
                session.forward,
                session.task,
                encoded,
                device=session.device,
                batch_size=session.config.train.eval_batch_size,
                autocast_dtype=session.autocast_dtype,
                world=session.world,
                in_step=session.sharded,
            )
            splits[role] = result.metrics
    return splits


def _publish(config: Config, out: Path) -> int:
    """Upload a finished run's adapter where that is asked for. Returns the exit code."""
    return upload(out / run_folder.ADAPTER, config.push_to_hub, config.hub.private) if config.push_to_hub else 0


def _follow(session: Session, progress: Progress) -> int:
    """Train along with the main process, which does all the writing. Returns the exit code."""
    signals = Signals(lambda text: None, alone=False)

    def save() -> None:
        capture(session, progress)  # its own random state goes into the main process's checkpoint

    hooks = Hooks(
        evaluate=lambda: _evaluated(session),
        export=lambda record: None,
        save=save,
        log=lambda record: None,
        event=lambda record: None,
        skipped=lambda record: None,
        evaluated=lambda record, better: None,
        stop=lambda: signals.name,
    )
    with signals:
        stopped = train(session, progress, hooks)
    if stopped:
        return EXIT_CODES[stopped]
    peaks(session)
    return 0


class _Run:
    """A run's files, opened; the hooks that the loop calls."""

    def __init__(
        self,
        session: Session,
        out: Path,
        checkpoint: Path | None = None,
        messages: Sequence[str] = (),
        progress: Progress | None = None,
        plan: str = "",
    ) -> None:
        self.session, self.out, self.progress = session, out, progress or Progress()
        self.signals = Signals(lambda text: self.view.line(text), alone=session.world.alone and session.traffic is None)
        self.saved = 0  # the step of the last checkpoint
        self.messages = list(messages)
        config = session.config
        if not config.resume and out.exists():
            run_folder.clear(out)
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / run_folder.CONFIG, session.composed.yaml)
        if checkpoint is not None:
            put_back(checkpoint, out / run_folder.ADAPTER)  # the best so far, or the last
            self.messages.append(f"resuming from {checkpoint}; the plan is in {run_folder.LOG}")
        self.trackers = build_trackers(session.composed, out, say=lambda text: self.view.line(text))
        # The checkpoint's own copy ends where it was written, and is known to be whole.
        start = checkpoint and checkpoint / run_folder.METRICS
        self.metrics = MetricsFile(out / run_folder.METRICS, start, copy=self.trackers.log)
        self.view = View(
            total_steps=session.total_steps,
            start_units=session.allocation.start_count,
            most_units=session.allocation.most_count if session.allocation.allocator.scores else 0,
            final_units="auto" if session.allocation.schedule.finds_budget else f"{session.allocation.last:,}",
            metric=session.task.metric_names[0],
            log=out / run_folder.LOG,
            first_step=self.progress.step,
            final_step=session.allocation.final_step,
            word=alive_word(session),
        )
        self.view.log(plan)

    def go(self) -> int:
        hooks = Hooks(
            evaluate=self._evaluate,
            export=self._export,
            save=self._save,
            log=self._log,
            event=self._event,
            skipped=self._skipped,
            evaluated=self._evaluated,
            stop=lambda: self.signals.name,
        )
        with self.trackers:
            return self._train(hooks)

    def _train(self, hooks: Hooks) -> int:
        with self.view, self.signals:
            for message in self.messages:
                self.view.line(message)
            stopped = train(self.session, self.progress, hooks)
            if stopped:
                state = f"saved step {self.progress.step}" if self.saved == self.progress.step else "nothing saved"
                self.view.line(f"{stopped}: {state}; go on with resume=true")
            elif self.signals.name:
                self.view.line(f"{self.signals.name} came at the last step: the run is complete")
        if stopped:
            self.trackers.state = STOPPED
            self._write_ranks()
            self.metrics.close()
            self._write_report()
            return EXIT_CODES[stopped]
        self._finish()
        return _publish(self.session.config, self.out)

    # ---- hooks ---------------------------------------------------------------------------------------------------
    def _evaluate(self) -> dict[str, dict[str, float]]:
        return _evaluated(self.session)

    def _export(self, record: dict[str, Any]) -> None:
        write_result(self.session, self.out / run_folder.ADAPTER, record)

    def _save(self) -> None:
        tensors, rest = capture(self.session, self.progress)
        if not all(bool(torch.isfinite(t).all()) for t in tensors["model"].values()):
            self.view.line(f"step {self.progress.step} not saved: its weights are not finite")
            return
        self.metrics.sync()
        folder = self.out / run_folder.CHECKPOINTS
        folder.mkdir(exist_ok=True)
        keep = self.session.config.train.keep_last
        copies = [self.metrics.path, self.out / run_folder.CONFIG]
        if self.progress.best or self.progress.last:
            copies.append(self.out / run_folder.ADAPTER)
        save_checkpoint(folder, self.progress.step, tensors, rest, copies=copies, keep_last=keep)
        self.saved = self.progress.step

    def _log(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        self.view.train(record)

    def _event(self, record: dict[str, Any]) -> None:
        self.metrics.write({"step": record["step"], "split": ALLOCATION, **record})
        self.view.event(record)

    def _skipped(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        guilty = f", rows {', '.join(map(str, record['guilty'][:8]))} of train" if record["guilty"] else ""
        self.view.line(f"step {record['step']} skipped: its {record['what']} is not finite{guilty}")

    def _evaluated(self, record: dict[str, Any], better: bool) -> None:
        for split, metrics in record["metrics"].items():
            self.metrics.write({"step": record["step"], "split": split, **metrics})
        self.view.evaluated(record, better)

    # ---- the end -------------------------------------------------------------------------------------------------
    def _finish(self) -> None:
        self.metrics.close()
        self._write_ranks()
        rss, device = peaks(self.session)
        files = {"adapter at": self.out / run_folder.ADAPTER}
        if self.session.config.save.merged:
            files["merged at"] = self.out / run_folder.MERGED
            # A process that was killed between here and the summary has merged already.
            report = merge(self.out / run_folder.ADAPTER, files["merged at"], replace=True)
            if report.quantization:
                print(f"merged with the original weights, not the {report.quantization} ones that were trained on:")
                print("  dora-merge base_weights=dequantised takes those")
        summary = summarise(self.session, self.progress, rss, device)
        write_run_cards(self.session.composed, summary, self.out)
        # A folder with a summary is a finished run; what comes after it can be made from the folder.
        atomic_write_text(self.out / run_folder.SUMMARY, json.dumps(jsonable(summary), indent=2) + "\n")
        self._write_report()
        self.trackers.end(summary)
        show(logged_end(self.out, summary, files | {"all files": self.out}))
        if self.session.config.export == "uniform":
            print("\n".join(serving_note(self.out / run_folder.ADAPTER)))

    def _write_report(self) -> None:
        if self.session.config.save.report:
            write_report(read_run(self.out), self.out / run_folder.REPORT)

    def _write_ranks(self) -> None:
        """When the process ends: until then events stand in metrics.jsonl, and a long run has many."""
        atomic_write_text(self.out / run_folder.RANKS, json.dumps(read_events(self.metrics.path)) + "\n")
