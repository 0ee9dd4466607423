"""A long run with frequent checkpoints, evaluations and events: memory, open files and time per step must stay flat.

    python scripts/faults/soak.py [--minutes 60] [--method dora] [--folder DIR] [--json FILE]

Looks at a `dora-train` process from outside, every five seconds, while it trains a tiny model; at half time it is
interrupted by SIGTERM and resumed. Prints a row per tenth of the time: CPU time per step, resident memory, open files,
threads, and the size of the run folder. Since virtual cores are faster and slower with what their neighbours do, CPU
time is also given in units of a fixed piece of work (numbers added up in Python, 10 to 20 ms) done at every look.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tiny

METHODS = {
    "dora": ["method=dora", "budget=r2", "adapter.rank=4"],  # silences and brings back
    "elalora": ["method=elalora", "budget=r2"],  # drops and grows, so that tensors change their shapes
    "lora": ["method=lora", "budget=r2"],
}
EVERY = ["train.log_every=20", "train.eval_every=100", "train.save_every=200", "train.scheduler=constant"]
SECONDS = 5.0
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Sample:
    """What the process was like: seconds since the start, steps done, CPU seconds, MiB, counts, MiB on the disk.

    ``work`` is the CPU seconds that the fixed piece of work took at that time.
    """

    seconds: float
    step: int
    cpu: float
    rss: float
    files: int
    threads: int
    disk: float
    work: float


def fixed_work() -> float:
    """CPU seconds of something that is always the same."""
    begin = time.thread_time()
    sum(range(1_000_000))
    return time.thread_time() - begin


def look(process: int, run: Path, begin: float) -> Sample | None:
    """None when the process has gone, or has not yet logged a step."""
    proc = Path(f"/proc/{process}")
    try:
        words = (proc / "stat").read_text().rpartition(")")[2].split()
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
        files = len(os.listdir(proc / "fd"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    if "VmRSS" not in status or (step := last_step(run / "metrics.jsonl")) is None:
        return None
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) if run.exists() else 0
    return Sample(
        seconds=time.monotonic() - begin,
        step=step,
        cpu=(int(words[11]) + int(words[12])) / TICK,
        rss=int(status["VmRSS"].split()[0]) / 1024,
        files=files,
        threads=int(status["Threads"]),
        disk=size / 2**20,
        work=fixed_work(),
    )


def last_step(metrics: Path) -> int | None:
    """That of the last whole line."""
    if not metrics.exists():
        return None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 20_000))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines and lines[-1].startswith(b"{") else None


def watch(words: list[str], run: Path, seconds: float, log: Path) -> tuple[list[Sample], int]:
    """Train for so long, then send SIGTERM. Returns the samples and the exit code."""
    with log.open("ab") as out:
        process = subprocess.Popen([sys.executable, "-m", "dora_cli.cli.train", *words], stdout=out, stderr=out)
    begin, samples = time.monotonic(), []
    while process.poll() is None and time.monotonic() - begin < seconds:
        time.sleep(SECONDS)
        try:
            if (sample := look(process.pid, run, begin)) is not None:
                samples.append(sample)
        except FileNotFoundError:  # a file was renamed while its size was asked for
            continue
    process.send_signal(signal.SIGTERM)
    return samples, process.wait(timeout=120)


def rows_of(samples: list[Sample], n: int) -> list[dict[str, float]]:
    """Samples in ``n`` stretches of time: medians (files: the least, as saving opens some), CPU time per step."""
    samples = [s for s in samples if s.step > samples[0].step]  # the start is over
    per = max(2, len(samples) // n)
    rows = []
    for i in range(0, len(samples) - per + 1, per):
        part = samples[i : i + per]
        steps = part[-1].step - part[0].step
        row = {name: statistics.median(getattr(s, name) for s in part) for name in ("rss", "threads", "disk")}
        row["files"] = min(s.files for s in part)
        row |= {"minute": part[-1].seconds / 60, "step": part[-1].step}
        row["ms"] = 1000 * (part[-1].cpu - part[0].cpu) / max(steps, 1)
        row["relative"] = row["ms"] / 1000 / statistics.median(s.work for s in part)
        rows.append(row)
    return rows


def verdict(rows: list[dict[str, float]]) -> list[str]:
    """What grew from the second stretch (the first one warms up) to the last."""
    first, last = rows[1], rows[-1]
    wrong = []
    if last["rss"] > 1.05 * first["rss"]:
        wrong.append(f"memory grew from {first['rss']:.0f} to {last['rss']:.0f} MiB")
    if last["files"] > first["files"]:
        wrong.append(f"open files grew from {first['files']:.0f} to {last['files']:.0f}")
    if last["threads"] > first["threads"]:
        wrong.append(f"threads grew from {first['threads']:.0f} to {last['threads']:.0f}")
    if last["relative"] > 1.10 * first["relative"]:
        wrong.append(f"CPU time per step grew from {first['relative']:.2f} to {last['relative']:.2f} units")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--method", default="dora", choices=METHODS)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    tiny.before_forks()
    os.environ["OMP_NUM_THREADS"] = "1"
    wrong, halves = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        tiny.make(folder)
        run, log = folder / "run", folder / "soak.log"
        words = ["recipe=text_classification", f"data.path={folder}/data", f"model.name={folder}/model"]
        words += ["data.max_length=16", "train.batch_size=8", "train.max_steps=20000000", f"out={run}", *EVERY]
        words += [*METHODS[options.method], "resume=true"]
        if options.method != "lora":
            words += ["allocator.interval=50", "schedule.start=0", "schedule.end=1.0"]
        print("  minute     step  CPU ms a step  in units   MiB  files  threads  disk MiB", flush=True)
        for half in range(2):
            samples, code = watch(words, run, 30 * options.minutes, log)
            if code != 128 + signal.SIGTERM:
                wrong.append(f"exit code {code}: see {log}\n{log.read_text()[-2000:]}")
                break
            rows = rows_of(samples, 5)
            halves.append({"rows": rows, "samples": [asdict(s) for s in samples]})
            for row in rows:
                minute = row["minute"] + half * options.minutes / 2
                print(
                    f"{minute:8.1f}{row['step']:9.0f}{row['ms']:15.2f}{row['relative']:10.3f}{row['rss']:6.0f}"
                    f"{row['files']:7.0f}{row['threads']:9.0f}{row['disk']:10.1f}",
                    flush=True,
                )
            wrong += verdict(rows)
    print("; ".join(wrong) or "flat")
    if options.json:
        result = {"settings": {"minutes": options.minutes, "method": options.method}, "wrong": wrong}
        rows_only = [half["rows"] for half in halves]
        options.json.write_text(json.dumps({**result, "halves": rows_only}, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
