"""TensorBoard: event files in ``RUN/tensorboard``."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from dora_cli.reporting.trackers.base import FINISHED, Scalar, tool


class TensorBoard:
    """A folder of event files is one run; a resumed one appends a file to it."""

    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def __init__(self, *, offline: bool) -> None:
        pass  # nothing of it reaches for a network

    @classmethod
    def check(cls, *, offline: bool) -> None:
        pass

    def start(self, folder: Path, project: str, name: str, config: Mapping[str, Scalar], known: str | None) -> str:
        self.config = config
        self.writer = tool("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
        if known is None:
            rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
            self.writer.add_text("configuration", f"| key | value |\n| --- | --- |\n{rows}", 0)
        return "tensorboard"

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step, new_style=True, double_precision=True)
        self.writer.flush()

    def close(self, summary: Mapping[str, float], state: str) -> None:
        if state == FINISHED:
            shown = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self.config.items()}
            final = {f"summary/{name}": value for name, value in summary.items()}
            for record in tool("torch.utils.tensorboard.summary").hparams(shown, final):
                self.writer.file_writer.add_summary(record)
            self.log(int(summary["train/steps"]), final)
        self.writer.close()
