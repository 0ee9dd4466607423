"""Trackio: in ``RUN/trackio``, in the folder of ``TRACKIO_DIR``, or in the Space of ``TRACKIO_SPACE_ID``."""

import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import ClassVar

from dora_cli.reporting.trackers.base import Scalar, tool

NETWORK = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio:
    """A run is known by its name within its project."""

    packages: ClassVar[tuple[str, ...]] = ("trackio",)

    def __init__(self, *, offline: bool) -> None:
        self.offline = offline

    @classmethod
    def check(cls, *, offline: bool) -> None:
        pass

    def start(self, folder: Path, project: str, name: str, config: Mapping[str, Scalar], known: str | None) -> str:
        if self.offline:
            for variable in NETWORK:
                os.environ.pop(variable, None)
        os.environ.setdefault("TRACKIO_DIR", str(folder.absolute() / "trackio"))  # read when it is imported
        with redirect_stdout(StringIO()):
            self.trackio = tool("trackio")
            self.run = self.trackio.init(
                project=project,
                name=known or name,
                config=dict(config),
                resume="allow" if known else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return str(self.run.name)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self, summary: Mapping[str, float], state: str) -> None:
        with redirect_stdout(StringIO()):
            if summary:
                final = {f"summary/{name}": value for name, value in summary.items()}
                self.run.log(final, step=int(summary["train/steps"]))
            self.trackio.finish()  # not the run's own, which would be finished once more at exit
