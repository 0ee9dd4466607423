"""Signals that ask a run to save and stop."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

# SIGUSR1 is what Slurm can be asked to send before it takes a job away, SIGHUP a terminal that closes.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
STOPPING = [s for name in NAMES if (s := getattr(signal, name, None)) is not None]
EXIT_CODES = {s.name: 128 + s for s in STOPPING}


class Signals:
    """Within, the first of ``STOPPING`` is noted in ``name`` for the loop; a second one ends the process at once.

    A terminal that closes may say so twice, by itself and through its shell: SIGHUP is never a second one. Under
    `nohup` it is ignored, and stays so. Of several processes none ends by itself: torchrun passes on what a terminal
    has sent to each of them already, and kills those that take too long.

    Args:
        say: takes a line for the user.
        alone: whether this process is the whole run.
    """

    def __init__(self, say: Callable[[str], None], *, alone: bool = True) -> None:
        self.say, self.alone = say, alone
        self.name: str | None = None

    def __enter__(self) -> Self:
        ignored = {s for s in STOPPING if s.name == "SIGHUP" and signal.getsignal(s) is signal.SIG_IGN}
        self._before = {s: signal.signal(s, self._handle) for s in STOPPING if s not in ignored}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        if self.name is not None:
            if name == "SIGHUP" or not self.alone:
                return
            with suppress(OSError):
                os.write(2, b"ended at once, nothing saved; resume=true goes on from the newest checkpoint\n")
            os._exit(EXIT_CODES[name])
        self.name = name
        with suppress(RuntimeError):  # it came in the midst of a write to the same stream, which takes no other
            self.say(f"{name}: saving after this step" + ("; once more ends at once" if self.alone else ""))
