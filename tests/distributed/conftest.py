"""Several processes of one run, forked from this one: what torchrun sets in the environment, and no start-up time."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: by a signal), and what it printed."""

    code: int
    out: str
    err: str


class Started:
    """Processes that run; ``ends`` waits for all of them."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        folder: Path,
        unplugged_at: int | None = None,
        first: Callable[[int], object] = lambda rank: None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.size, self.unplugged_at, self.first = folder, len(commands), unplugged_at, first
        fork = mp.get_context("fork")
        self.processes = [
            fork.Process(target=self._run, args=(rank, port, list(words))) for rank, words in enumerate(commands)
        ]
        for process in self.processes:
            process.start()

    def ends(self, timeout: float = 120) -> list[Ended]:
        ended = []
        for rank, process in enumerate(self.processes):
            process.join(timeout)
            if process.exitcode is None:
                for other in self.processes:
                    other.kill()
                raise AssertionError(f"process {rank} hangs:\n{self._said(rank, 'err')}")
            ended.append(Ended(process.exitcode, self._said(rank, "out"), self._said(rank, "err")))
        return ended

    def _said(self, rank: int, stream: str) -> str:
        return (self.folder / f"{rank}.{stream}").read_text()

    def _run(self, rank: int, port: int, words: list[str]) -> None:
        from dora_cli.cli.train import main

        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for number, name in ((1, "out"), (2, "err")):
            file = (self.folder / f"{rank}.{name}").open("w", buffering=1)
            os.dup2(file.fileno(), number)
            setattr(sys, "stdout" if number == 1 else "stderr", file)
        self.first(rank)
        if self.unplugged_at is not None and rank == self.size - 1:
            self._pull_the_plug(self.unplugged_at)
        os._exit(main(words))

    def _pull_the_plug(self, step: int) -> None:
        """Be killed when the checkpoint of a step has been written."""
        from dora_cli.cli import train_run

        real = train_run.capture

        def capture(session: Any, progress: Any) -> Any:
            captured = real(session, progress)
            if progress.step == step:
                checkpoint = Path(session.config.out) / "checkpoints" / f"step-{step:08d}"
                if session.world.is_main:  # alone: nobody else would write it
                    train_run.save_checkpoint(
                        checkpoint.parent,
                        step,
                        *captured,
                        copies=[checkpoint.parents[1] / "config.yaml", checkpoint.parents[1] / "metrics.jsonl"],
                        keep_last=2,
                    )
                while not checkpoint.is_dir():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return captured

        train_run.capture = capture  # type: ignore[assignment]


Start = Callable[..., Started]


@pytest.fixture(scope="session")
def still_model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without dropout, which each process would draw for itself; and with weights of a size for which
    its gradients are more than rounding, which Adam would blow up to full steps."""
    folder = tmp_path_factory.mktemp("still") / "model"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    large = {name: 15 * w if w.dim() == 2 else w for name, w in weights.items()}
    save_file(large, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def common(still_model: Path, data_dir: Path) -> list[str]:
    """What all runs have in common. Everything that they import is imported once, before they are forked."""
    import torch.distributed.fsdp  # noqa: F401
    import torchmetrics.classification  # noqa: F401

    from dora_cli.cli import together_run  # noqa: F401
    from dora_cli.cli.train import main

    fixed = [f"model.name={still_model}", f"data.path={data_dir}", "recipe=text_classification"]
    fixed += ["data.max_length=16", "train.batch_size=8", "train.timeout=60"]
    assert main([*fixed, "method=dora", "budget=r2", "dry_run=true"]) == 0
    return fixed


@pytest.fixture
def start(tmp_path: Path, common: list[str]) -> Start:
    """Start processes on the tiny model and data: one for each list of words, or ``size`` with the same words."""

    def make(*own: str, size: int = 2, each: Sequence[Sequence[str]] = (), **how: Any) -> Started:
        folder = tmp_path / f"said{len(list(tmp_path.glob('said*')))}"
        folder.mkdir()
        return Started([[*common, *own, *more] for more in each or [[]] * size], folder, **how)

    return make
