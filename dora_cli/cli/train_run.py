"""One training run: build, plan, train, write. Everything that the rooms may not know of each other meets here."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

from dora_cli.adapters.base import AdapterLayer, is_transposed, linear_shape
from dora_cli.adapters.mora import MoraLayer
from dora_cli.adapters.weight_decomposed import WeightDecomposedLayer
from dora_cli.checkpoints.adapter_format import (
    LowRank,
    Square,
    TokenRows,
    WeightDecomposed,
    saved_by_peft,
    write_adapter,
    write_full,
    write_square,
)
from dora_cli.checkpoints.apply import start_from
from dora_cli.checkpoints.atomic import atomic_write_text, sweep
from dora_cli.checkpoints.manifest import verify_if_listed
from dora_cli.checkpoints.merge import merge
from dora_cli.checkpoints.peft_io import read_adapter
from dora_cli.checkpoints.run_state import load_checkpoint, newest_checkpoint, put_back, save_checkpoint
from dora_cli.cli import run_folder
from dora_cli.cli.lock import locked
from dora_cli.config.compose import Composed
from dora_cli.errors import UserError
from dora_cli.evaluation.predict import evaluate
from dora_cli.evaluation.scorers import build_scorer
from dora_cli.reporting.events import ALLOCATION, MetricsFile, jsonable, read_events
from dora_cli.reporting.terminal import View, print_plan, print_summary
from dora_cli.training.loop import Hooks, train
from dora_cli.training.plan import alive_word, describe
from dora_cli.training.setup import Begin, Session, build
from dora_cli.training.state import Progress, capture, restore
from dora_cli.training.summary import rank_map, summarise

# SIGUSR1 is what Slurm can be asked to send before it takes a job away, SIGHUP a terminal that closes.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
STOPPING = [s for name in NAMES if (s := getattr(signal, name, None)) is not None]
EXIT_CODES = {s.name: 128 + s for s in STOPPING}


def run(composed: Composed) -> int:
    """Train as composed. Returns the exit code.

    Raises:
        UserError: anything the user can put right; before the folder is made wherever that can be known.
    """
    config = composed.config
    budget = config.budget if composed.parts["adapter"].budgeted else None
    default = run_folder.default_out(composed.recipe, composed.method, budget, config.seed)
    out = Path(config.out) if config.out else default
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if config.dry_run:
        print_plan(describe(_build(composed, None), str(out)))
        return 0
    run_folder.check_ours(out)
    if config.resume and run_folder.is_finished(out):
        print(f"{out} is finished; nothing to resume")
        return 0
    with ExitStack() as stack:
        there = run_folder.is_run(out)
        held = stack.enter_context(locked(out)) if there else False
        run_folder.check_free(out, resume=config.resume, overwrite=config.overwrite)
        checkpoint, messages = newest_checkpoint(out / run_folder.CHECKPOINTS) if config.resume else (None, [])
        saved = (checkpoint or out) / run_folder.CONFIG  # the checkpoint's own copy is known to be whole
        if config.resume and saved.exists():
            run_folder.check_same(saved.read_text(encoding="utf-8", errors="replace"), composed.yaml, saved)
        session = _build(composed, checkpoint)
        print_plan(describe(session, str(out)))
        if not there:  # a folder is made when all that can be known has been looked at
            out.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(locked(out))
            if run_folder.is_run(out):
                raise UserError(f"out={out} was taken by another process meanwhile", hint="choose another out=DIR")
        for folder in (out, out / run_folder.CHECKPOINTS):
            sweep(folder, everyone=held)  # of all that was being written when a process was killed here
        return _Run(session, out, checkpoint, messages).go()


def _build(composed: Composed, checkpoint: Path | None) -> Session:
    if Path(composed.config.model.name).is_dir():
        verify_if_listed(composed.config.model.name)
    session = build(composed, None if checkpoint else _begin(composed))
    build_scorer(session.task)  # a wrong name, before the folder is made
    return session


def _begin(composed: Composed) -> Begin | None:
    """What ``adapter.init_from`` asks for; read now, so that a wrong folder is refused before a model loads."""
    folder = getattr(composed.parts["adapter"], "init_from", None)
    if folder is None:
        return None
    adapter = read_adapter(Path(expanduser(folder)))
    return lambda layers, model: start_from(layers, model, adapter)


class _Run:
    """A run's files, opened; the hooks that the loop calls."""

    def __init__(
        self, session: Session, out: Path, checkpoint: Path | None = None, messages: Sequence[str] = ()
    ) -> None:
        self.session, self.out, self.progress = session, out, Progress()
        self.signal: str | None = None
        self.saved = 0  # the step of the last checkpoint
        self.messages = list(messages)
        config = session.config
        if not config.resume and out.exists():
            run_folder.clear(out)
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / run_folder.CONFIG, session.composed.yaml)
        if checkpoint is not None:
            self.progress = restore(session, *load_checkpoint(checkpoint))
            put_back(checkpoint, out / run_folder.ADAPTER)  # the best so far, or the last
            self.messages.append(f"resuming from {checkpoint}")
        # The checkpoint's own copy ends where it was written, and is known to be whole.
        self.metrics = MetricsFile(out / run_folder.METRICS, checkpoint and checkpoint / run_folder.METRICS)
        self.view = View(
            total_steps=session.total_steps,
            start_units=session.allocation.start_count,
            most_units=session.allocation.most_count if session.allocation.allocator.scores else 0,
            final_units=f"{session.allocation.last:,}",
            metric=session.task.metric_names[0],
            log=out / run_folder.LOG,
            first_step=self.progress.step,
            word=alive_word(session),
        )

    def go(self) -> int:
        hooks = Hooks(
            evaluate=self._evaluate,
            export=self._export,
            save=self._save,
            log=self._log,
            event=self._event,
            skipped=self._skipped,
            evaluated=self._evaluated,
            stop=lambda: self.signal,
        )
        with self.view, self._signals():
            for message in self.messages:
                self.view.line(message)
            stopped = train(self.session, self.progress, hooks)
            if stopped:
                state = f"saved step {self.progress.step}" if self.saved == self.progress.step else "nothing saved"
                self.view.line(f"{stopped}: {state}; go on with resume=true")
            elif self.signal:
                self.view.line(f"{self.signal} came at the last step: the run is complete")
        if stopped:
            self._write_ranks()
            self.metrics.close()
            return EXIT_CODES[stopped]
        self._finish()
        return 0

    # ---- hooks ---------------------------------------------------------------------------------------------------
    def _evaluate(self) -> dict[str, dict[str, float]]:
        session = self.session
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
                )
                splits[role] = result.metrics
        return splits

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
        files = {"adapter at": self.out / run_folder.ADAPTER}
        if self.session.config.save.merged:
            files["merged at"] = self.out / run_folder.MERGED
            # A process that was killed between here and the summary has merged already.
            merge(self.out / run_folder.ADAPTER, files["merged at"], replace=True)
        summary = summarise(self.session, self.progress)
        # Last of all: a folder with a summary is a finished run.
        atomic_write_text(self.out / run_folder.SUMMARY, json.dumps(jsonable(summary), indent=2) + "\n")
        print_summary(summary, files | {"all files": self.out})

    def _write_ranks(self) -> None:
        """When the process ends: until then events stand in metrics.jsonl, and a long run has many."""
        atomic_write_text(self.out / run_folder.RANKS, json.dumps(read_events(self.metrics.path)) + "\n")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first of ``STOPPING`` asks the loop to save and stop; a second one ends the process at once.

        A terminal that closes may say so twice, by itself and through its shell: SIGHUP is never a second one. Under
        `nohup` it is ignored, and stays so.
        """

        def handle(number: int, _: object) -> None:
            name = signal.Signals(number).name
            if self.signal is not None:
                if name == "SIGHUP":
                    return
                with suppress(OSError):
                    os.write(2, b"ended at once, nothing saved; resume=true goes on from the newest checkpoint\n")
                os._exit(EXIT_CODES[name])
            self.signal = name
            self.view.line(f"{name}: saving after this step; once more ends at once")

        ignored = {s for s in STOPPING if s.name == "SIGHUP" and signal.getsignal(s) is signal.SIG_IGN}
        before = {s: signal.signal(s, handle) for s in STOPPING if s not in ignored}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def write_result(session: Session, folder: Path, record: dict[str, Any]) -> None:
    """Write the weights as they are into ``folder``, in PEFT's layout where ΔW has low rank (DESIGN 5)."""
    composed = session.composed
    method = {
        "method": composed.method,
        "parts": composed.names,
        "recipe": composed.recipe,
        "step": record["step"],
        "metrics": record["metrics"],
        "architecture": type(session.model).__name__,
        "base_model_prefix": getattr(session.model, "base_model_prefix", ""),
        "model_config": _model_config(session.model),
        "ranks": rank_map(session),
        "added_tokens": session.config.model.add_tokens,
        "modules": session.allocation.table.names,  # what ``module`` in method_state.safetensors counts
    }
    task_type = session.task.peft_task_type
    heads = saved_by_peft((n for n, _ in session.model.named_modules()), session.head_modules, task_type)
    head = {k: v for k, v in session.model.state_dict().items() if k.startswith(tuple(f"{h}." for h in heads))}
    common: dict[str, Any] = {
        "head_modules": heads,
        "base_name": session.source,
        "revision": session.config.model.revision,
        "task_type": task_type,
        "method": method,
    }
    if composed.parts["adapter"].export == "full":
        trained = {n: p.detach() for n, p in session.trained_parameters().items()}
        write_full(folder, {**trained, **head}, **common)
        return
    if composed.parts["adapter"].export == "square":
        squares = [_square(name, layer) for name, layer in session.layers.items() if layer.active]
        write_square(folder, squares, head=head, state=session.allocation.unit_state(), **common)
        return
    modules = [_low_rank(session, name) for name in session.targets]
    if composed.parts["adapter"].export == "decomposed":  # then what is its base again stays out of the file
        modules = [module for module in modules if isinstance(module, WeightDecomposed)] or modules
    write_adapter(
        folder,
        modules=modules,
        head=head,
        export=session.config.export,
        state=session.allocation.unit_state(),
        tokens=[TokenRows(n, la.ids.tolist(), la.rows.detach().cpu()) for n, la in session.token_rows.items()],
        tokenizer=session.tokenizer if session.new_tokens else None,
        **common,
    )


def _low_rank(session: Session, name: str) -> LowRank:
    """The living components of one target module; none where it has no adapter (any more)."""
    table = session.allocation.table
    if name not in session.layers:
        return _nothing(name, session.model.get_submodule(name))
    layer = session.layers[name]
    a, b = layer.low_rank()
    if not layer.active:
        return _nothing(name, layer.base_layer)
    if table.kind == "components":
        living = table.contributing()[table.rows[table.names.index(name)]].to(a.device)
        a, b = a[living], b[:, living]
    if isinstance(layer, WeightDecomposedLayer):
        magnitude = layer.magnitude.detach().cpu()
        return WeightDecomposed(name, a.cpu(), b.cpu(), layer.transposed, magnitude=magnitude)
    return LowRank(name, a.cpu(), b.cpu(), layer.transposed)


def _square(name: str, layer: AdapterLayer) -> Square:
    assert isinstance(layer, MoraLayer)
    return Square(name, layer.m.detach().cpu(), (layer.d_out, layer.d_in), layer.transposed)


def _nothing(name: str, module: torch.nn.Module) -> LowRank:
    d_out, d_in = linear_shape(module)
    return LowRank(name, torch.empty(0, d_in), torch.empty(d_out, 0), is_transposed(module))


def _model_config(model: Any) -> dict[str, Any]:
    """The configuration as trained: labels, problem type, pad token."""
    settings: dict[str, Any] = model.config.to_diff_dict()
    return settings
