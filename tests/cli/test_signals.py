"""What a signal does to the run it reaches, wherever it reaches it."""

import io
import os
import signal

from dora_cli.cli.signals import Signals


class _Interrupted(io.RawIOBase):
    """A stream during whose first write the process gets a signal."""

    def __init__(self) -> None:
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        if not self.written:
            os.kill(os.getpid(), signal.SIGTERM)
        self.written += bytes(data)  # type: ignore[call-overload]
        return len(bytes(data))  # type: ignore[call-overload]


def test_a_signal_in_the_midst_of_a_line_stops_the_run_after_the_step_all_the_same() -> None:
    """Python's streams refuse a line that is printed from within the writing of another (a run ended by that once)."""
    raw = _Interrupted()
    log = io.TextIOWrapper(io.BufferedWriter(raw), write_through=True)
    with Signals(lambda text: print(text, file=log, flush=True)) as signals:
        print("step 3/60", file=log, flush=True)
        assert signals.name == "SIGTERM"
        print("step 4/60", file=log, flush=True)
    assert raw.written == b"step 3/60\nstep 4/60\n"
