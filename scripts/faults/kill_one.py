"""`kill -9` of one of several processes of a run, at random instants, and what becomes of the others.

    python scripts/faults/kill_one.py [--kills 10] [--processes 2] [--methods NAME …] [--words KEY=VALUE …] [--seed 0]

A run on a tiny model, started as torchrun starts it, loses one process, drawn anew each time, at any instant of its
life. The others must end by themselves, with a message and exit code 1, sooner than the timeout; what has its final
name must be whole; then all are started again with resume=true. At the end adapter, metrics, ranks and summary must be
those of processes that nobody disturbed, to the byte.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed.fsdp
from kill import METHODS, Tally, before_forks, inspect, last_step, outcome, tiny_run, unfinished

from dora_cli.cli import together_run  # noqa: F401 - before the forks
from dora_cli.cli.train import main as dora_train

TIMEOUT = 30  # of the run's processes, in seconds


def start(words: list[str], size: int, log: Path) -> list[int]:
    """Fork the processes of a run; returns their numbers by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            signal.alarm(10 * TIMEOUT)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with log.open("a", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                code = dora_train(words)
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return children


def ends(children: list[int]) -> list[int]:
    """Exit codes by rank, negative where a signal ended a process."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def campaign(method: str, options: argparse.Namespace, folder: Path, draw: random.Random) -> Tally:
    """Kill processes of runs of one method, and resume until all kills are spent and the last run has ended."""
    tally, log, size = Tally(), folder / f"{method}.log", options.processes
    words = [*tiny_run(folder, method), f"train.timeout={TIMEOUT}", *options.words]
    whole, run = folder / method / "whole", folder / method / "run"
    begin = time.monotonic()
    assert ends(start([*words, f"out={whole}"], size, log)) == [0] * size, f"the undisturbed run failed: see {log}"
    lifetime, expected, slowest = time.monotonic() - begin, outcome(whole), 0.0
    while tally.kills.total() < options.kills or run.exists():
        children = start([*words, f"out={run}", "resume=true"], size, log)
        victim = None
        if tally.kills.total() < options.kills:
            victim = draw.randrange(size)
            time.sleep(draw.uniform(0.0, lifetime))
            os.kill(children[victim], signal.SIGKILL)
        struck = time.monotonic()
        codes = ends(children)
        killed = victim is not None and codes[victim] == -signal.SIGKILL
        if killed:
            tally.kills[f"process {victim}"] += 1
            slowest = max(slowest, time.monotonic() - struck)
            tally.lost = max(tally.lost, last_step(run) - inspect(run, tally)) if run.exists() else tally.lost
        # One that had done all there was to do may have ended well.
        allowed = {0, 1} if killed else {0}
        tally.wrong += [f"exit code {c}: see {log}" for r, c in enumerate(codes) if r != victim and c not in allowed]
        if (run / "summary.json").exists():
            tally.ended += 1
            found = outcome(run)
            tally.wrong += [f"{name} differs" for name in expected if found.get(name) != expected[name]]
            tally.wrong += [f"left behind: {path.name}" for path in unfinished(run) if not killed]
            shutil.rmtree(run)
        if tally.wrong:
            break
    print(f"  the others ended {slowest:.1f} s after a kill at the latest (timeout {TIMEOUT} s)")
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each method")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["dora"], choices=METHODS)
    parser.add_argument("--words", nargs="*", default=[], help="more of the run's keys, such as train.shard=full")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        before_forks(folder)
        assert torch.distributed.fsdp
        for method in options.methods:
            tally = campaign(method, options, folder, random.Random(f"{options.seed} {method}"))
            kills = ", ".join(f"{n} of {who}" for who, n in sorted(tally.kills.items()))
            print(
                f"{method}: {kills}; {tally.inside} left something unfinished, {tally.ended} runs ended and were "
                f"compared, {tally.lost} steps lost at most; wrong: {'; '.join(tally.wrong) or 'nothing'}",
                flush=True,
            )
            if tally.wrong:
                print((folder / f"{method}.log").read_text(encoding="utf-8")[-3000:], file=sys.stderr)
            wrong |= bool(tally.wrong)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
