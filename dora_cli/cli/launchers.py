"""Who runs the jobs of a sweep: this terminal, several processes of this machine, or a cluster.

A job is a command line, so that it is a fresh process with exit codes of its own wherever it runs, and nothing of ours
has to be pickled but words.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from dora_cli.config.launching import Launching
from dora_cli.config.sweeps import Basic, Joblib, SubmititLocal
from dora_cli.errors import UserError

# torchrun knows SIGUSR1, which is what a cluster announces the end by, only if it is told.
TORCHRUN_SIGNALS = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}
LOOK_EVERY = {"local": 0.2, "slurm": 5.0}  # seconds between looks at which jobs have ended
TOGETHER = 1.0  # seconds within which a cluster has sent a signal to every process of a job
FOR_ANY_CLUSTER = ("name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")  # options as submitit names them
FOLDER = ".submitit"


@dataclass(frozen=True)
class Command:
    """A job: its words, and the file that takes what it says (empty: this terminal)."""

    words: list[str]
    log: str = ""

    def start(self) -> "subprocess.Popen[bytes]":
        """Begin it, in an environment like ours."""
        environment = {**TORCHRUN_SIGNALS, **os.environ}
        if not self.log:
            return subprocess.Popen(self.words, env=environment)
        Path(self.log).parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )


class Launcher(Protocol):
    """Runs commands.

    Attributes:
        at_once: how many a search may propose at a time.
        shows: whether jobs speak in this terminal.
    """

    at_once: int
    shows: bool

    def run(self, commands: Sequence[Command], begun: Callable[[int], object]) -> Iterator[tuple[int, int | None]]:
        """Run all. Says when one begins, and gives (index, exit code) as each ends; None where it never began."""
        ...

    def stop(self, number: int) -> None:
        """Let what runs save and end, and begin no more; called from a signal's handler."""
        ...


def build_launcher(launching: Launching, parent: Path) -> Launcher:
    """The launcher that ``hydra/launcher`` names.

    Args:
        launching: its name and options.
        parent: folder of the sweep.

    Raises:
        UserError: the package that it needs is not installed, or there is no Slurm here.
    """
    options = launching.options
    if isinstance(options, Joblib):
        require("joblib", "hydra/launcher=joblib")
        return Several(options.n_jobs)
    if isinstance(options, SubmititLocal):
        require("submitit", f"hydra/launcher={launching.launcher}")
        cluster = launching.launcher.removeprefix("submitit_")
        if cluster == "slurm" and shutil.which("srun") is None:
            hint = "start the sweep on the cluster's login node; hydra/launcher=submitit_local rehearses it anywhere"
            raise UserError("hydra/launcher=submitit_slurm: there is no Slurm here (no srun)", hint=hint)
        return Cluster(cluster, options, parent / FOLDER)
    return OneByOne()


def require(package: str, asked: str) -> None:
    """Refuse what an extra brings, where it is missing.

    Raises:
        UserError: naming the extra, which is called after the package.
    """
    if find_spec(package) is None:
        raise UserError(f"{asked} needs the package {package}", hint=f"pip install 'dora-cli[{package}]'")


def with_processes(words: list[str], options: Basic) -> list[str]:
    """``python -m MODULE …``, by torchrun where a job is several processes."""
    if options.nproc_per_node == 1:
        return words
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.nproc_per_node}"]
    return [words[0], *torchrun, *words[1:]]


class OneByOne:
    """Children of this process, one after the other, in its terminal."""

    at_once, shows = 1, True

    def __init__(self) -> None:
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped = 0

    def run(self, commands: Sequence[Command], begun: Callable[[int], object]) -> Iterator[tuple[int, int | None]]:
        for index, command in enumerate(commands):
            yield self._one(index, command, begun)

    def stop(self, number: int) -> None:
        self._stopped = number
        if number == signal.SIGINT and _at_terminal():
            return  # Ctrl-C has reached the jobs as well, and a second one would end them unsaved
        for child in list(self._children):
            child.send_signal(number)

    def _one(self, index: int, command: Command, begun: Callable[[int], object]) -> tuple[int, int | None]:
        if self._stopped:
            return index, None
        begun(index)
        child = command.start()
        self._children.add(child)
        if self._stopped:  # meanwhile
            child.send_signal(self._stopped)
        code = child.wait()
        self._children.discard(child)
        return index, exit_code(code)


class Several(OneByOne):
    """So many children at once, by joblib. Threads are enough, since each only waits for a process."""

    shows = False

    def __init__(self, n_jobs: int) -> None:
        from joblib import effective_n_jobs

        super().__init__()
        if n_jobs == 0:
            raise UserError("hydra.launcher.n_jobs=0 runs nothing", hint="-1 runs one job a core")
        self.at_once = effective_n_jobs(n_jobs)

    def run(self, commands: Sequence[Command], begun: Callable[[int], object]) -> Iterator[tuple[int, int | None]]:
        from joblib import Parallel, delayed

        calls = (delayed(self._one)(index, command, begun) for index, command in enumerate(commands))
        yield from Parallel(self.at_once, backend="threading", return_as="generator_unordered")(calls)


class Cluster:
    """Jobs handed to submitit, which keeps what it needs of them in ``folder``, pickled."""

    at_once, shows = 1, False

    def __init__(self, cluster: str, options: SubmititLocal, folder: Path) -> None:
        # Read when submitit is first imported, here and where the job runs: the signal by which dora-train saves.
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
        import submitit

        given = {name: value for name, value in vars(options).items() if value not in (None, [], {})}
        del given["nproc_per_node"]
        retries = given.pop("max_num_timeout")
        self._executor: Any
        if cluster == "local":
            self._executor = submitit.LocalExecutor(folder, max_num_timeout=retries)
        else:
            self._executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=retries)
            given = {name if name in FOR_ANY_CLUSTER else f"slurm_{name}": value for name, value in given.items()}
        self._executor.update_parameters(**given)
        self._cluster = cluster
        self._jobs: dict[int, Any] = {}
        self._stopped = 0

    def run(self, commands: Sequence[Command], begun: Callable[[int], object]) -> Iterator[tuple[int, int | None]]:
        # A terminal's Ctrl-C is for us alone: submitit's own processes inherit that they do not hear it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with self._executor.batch():
                handed = [self._executor.submit(Remote(command)) for command in commands]
        finally:
            signal.signal(signal.SIGINT, before)
        self._jobs = dict(enumerate(handed))
        if self._stopped:  # meanwhile
            self.stop(self._stopped)
        for index in self._jobs:
            begun(index)
        while self._jobs:
            for index, job in list(self._jobs.items()):
                if job.done(force_check=bool(self._stopped)):
                    del self._jobs[index]
                    yield index, _result(job)
            time.sleep(LOOK_EVERY[self._cluster])

    def stop(self, number: int) -> None:
        self._stopped = number
        for job in self._jobs.values():
            if self._cluster == "local":
                os.kill(int(job.job_id), signal.SIGTERM)
            else:
                subprocess.call(["scancel", "--state=PENDING", job.job_id])
                subprocess.call(["scancel", "--signal=TERM", job.job_id])


@dataclass(frozen=True)
class Remote:
    """A command, run by a process of submitit's; the one thing of ours that is pickled: its name and some words."""

    command: Command
    again: bool = False

    def __call__(self) -> int:
        words = self.command.words
        if self.again or "SLURM_RESTART_COUNT" in os.environ:
            words = [*words, "resume=true", "overwrite=false"]
        # A caught signal is back to its default in the child, an ignored one would stay ignored.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: threading.Timer(TOGETHER, _end_child).start())
        child = replace(self.command, words=words).start()
        _CHILD[:] = [child.pid]
        return exit_code(child.wait())

    def checkpoint(self) -> Any:
        """What submitit calls when the job's time is over, or another job wants its place: save, and begin again."""
        from submitit.helpers import DelayedSubmission

        time.sleep(TOGETHER)
        _end_child()
        # Not child.wait(), whose lock may be held by the very call that this signal has interrupted.
        for pid in _CHILD:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(replace(self, again=True))


_CHILD: list[int] = []  # process id of what a Remote runs; there is one a process


def _end_child() -> None:
    """SIGHUP, since a run never takes it for a second signal: Slurm may have sent one to every process of the job."""
    for pid in _CHILD:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)


def _result(job: Any) -> int | None:
    """The exit code of a job that submitit calls done: 1 where it was taken away, None where it never began."""
    try:
        code: int = job.result()
        return code
    except Exception as error:
        if "CANCELLED" in str(job.state):
            return None
        print(f"sweep: job {job.job_id}: {str(error).strip().splitlines()[-1][:200]}", file=sys.stderr)
        return 1


def exit_code(code: int) -> int:
    """A process that a signal ended has a negative code for Python; a shell calls it 128 + signal."""
    return 128 - code if code < 0 else code


def _at_terminal() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return False
