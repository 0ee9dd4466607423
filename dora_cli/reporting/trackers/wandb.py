"""Weights & Biases: on its server, or offline in ``RUN/wandb`` for ``wandb sync`` later."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from dora_cli.errors import UserError
from dora_cli.reporting.trackers.base import FAILED, FINISHED, Scalar, tool


class Wandb:
    """``WANDB_MODE`` and the other variables of its own mean what they always do; ``offline=true`` beats them."""

    packages: ClassVar[tuple[str, ...]] = ("wandb",)

    def __init__(self, *, offline: bool) -> None:
        self.offline = offline

    @classmethod
    def check(cls, *, offline: bool) -> None:
        if offline or os.environ.get("WANDB_MODE", "online") != "online":
            return
        hint = "run wandb login (or set WANDB_API_KEY), or keep it local: offline=true or WANDB_MODE=offline"
        try:
            logged_in = tool("wandb").login(prompt=False)
        except tool("wandb").Error as error:  # a key that is none, or a server that nobody reaches
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError("track.to=wandb: the login at Weights & Biases failed", where=reason, hint=hint) from None
        if not logged_in:
            raise UserError("track.to=wandb: nobody is logged in to Weights & Biases here", hint=hint)

    def start(self, folder: Path, project: str, name: str, config: Mapping[str, Scalar], known: str | None) -> str:
        wandb = tool("wandb")
        quiet = {"silent": True, "console": "off", "finish_timeout": 60.0, "finish_timeout_raises": False}
        self.run = wandb.init(
            project=project,
            name=name,
            id=known,
            resume="allow" if known else None,
            dir=str(folder),
            mode="offline" if self.offline else None,
            config=None if known else dict(config),
            settings=wandb.Settings(**quiet),
        )
        return str(self.run.id)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self, summary: Mapping[str, float], state: str) -> None:
        self.run.summary.update({f"summary/{name}": value for name, value in summary.items()})
        self.run.finish(exit_code={FINISHED: 0, FAILED: 1}.get(state, 130))
