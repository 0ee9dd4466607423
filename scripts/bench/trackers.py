"""Train for some seconds with every tracker that is installed, read back what each has kept, and compare.

    python scripts/bench/trackers.py [--steps 40]

Every number in metrics.jsonl, its step and its value must be in each tracker once, and nothing else but the summary.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[int, float]]]  # name → (step, value) in the order of steps
BLOCK = 32_768  # of a .wandb file, which is a LevelDB log behind seven bytes


def expected(run: Path) -> Series:
    """What metrics.jsonl says."""
    series: Series = defaultdict(list)
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for key, value in record.items():
            if key in ("step", "split") or value is None or isinstance(value, str):
                continue
            if key == "ranks":
                named = {f"ranks/{m}": r for m, r in value.items()}
            elif key == "standing":  # the line between what stays and what goes, where there is one
                line = {f"allocation/{name}": value[name] for name in ("lowest_kept", "highest_lost")}
                named = {name: number for name, number in line.items() if number is not None}
            else:
                named = {f"{record['split']}/{key}": value}
            for name, number in named.items():
                series[name].append((record["step"], len(number) if isinstance(number, list) else number))
    return series


def from_tensorboard(run: Path) -> tuple[Series, dict[str, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    series = {
        name: [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors(name)]
        for name in events.Tags()["tensors"]
        if not name.endswith("text_summary")
    }
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    rows = [[cell.strip() for cell in line.strip("|").split("|", 1)] for line in text.splitlines()[2:]]
    return series, dict(rows)


def from_wandb(run: Path) -> tuple[Series, dict[str, str]]:
    from wandb.proto import wandb_internal_pb2 as messages

    series: Series = defaultdict(list)
    config = {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in _leveldb(file.read_bytes()[7:]):
            record = messages.Record()
            record.ParseFromString(data)
            for update in record.run.config.update:
                config[update.key] = _text(json.loads(update.value_json))
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for name, value in row.items():
                if not name.startswith("_"):
                    series[name].append((row["_step"], value))
    return series, config


def from_mlflow(run: Path) -> tuple[Series, dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.absolute() / 'mlflow' / 'mlflow.db'}")
    identity = json.loads((run / "trackers.json").read_text())["mlflow"]["id"]
    data = client.get_run(identity).data
    series = {n: sorted((m.step, m.value) for m in client.get_metric_history(identity, n)) for n in data.metrics}
    return series, data.params


def from_trackio(run: Path) -> tuple[Series, dict[str, str]]:
    """In a process of its own: which folder it reads is settled when it is imported."""
    code = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage as storage
project, run = sys.argv[1:]
print(json.dumps([storage.get_logs(project, run), storage.get_run_config(project, run)]))
"""
    known = json.loads((run / "trackers.json").read_text())["trackio"]["id"]
    env = {**os.environ, "TRACKIO_DIR": str(run.absolute() / "trackio")}
    words = [sys.executable, "-c", code, "dora_cli", known]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    rows, config = json.loads(done.stdout.splitlines()[-1])
    series: Series = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                series[name].append((row["step"], value))
    return series, {k: _text(v) for k, v in config.items()}


READERS: dict[str, Callable[[Path], tuple[Series, dict[str, str]]]] = {
    "tensorboard": from_tensorboard,
    "wandb": from_wandb,
    "mlflow": from_mlflow,
    "trackio": from_trackio,
}


def differences(found: Series, wanted: Series) -> list[str]:
    """A line for each number that is missing, there twice, of another value, or in nobody's record."""
    found = {name: rows for name, rows in found.items() if not name.startswith("summary/")}
    return [
        f"{name}: {found.get(name, [])} instead of {wanted.get(name, [])}"
        for name in sorted({*found, *wanted})
        if sorted(found.get(name, [])) != sorted(wanted.get(name, []))
    ]


def _text(value: Any) -> str:
    return str(value)


def _leveldb(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: fragments that do not cross the borders of blocks."""
    place, parts = 7, b""  # counted with the header
    while place + 7 <= len(data) + 7:
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place - 7)
        parts += data[place : place + size]
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""
        place += 7 + size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    names = [name for name in READERS if find_spec(name)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["recipe=quickstart", f"train.max_steps={steps}", "train.log_every=5", f"train.eval_every={steps // 2}"]
        words += ["offline=true", f"track.to=[{','.join(names)}]", f"out={run}"]
        subprocess.run([sys.executable, "-m", "dora_cli.cli.train", *words], check=True)
        wanted, wrong = expected(run), 0
        summary = json.loads((run / "summary.json").read_text())
        value = summary["metrics"]["validation"]["accuracy"]
        print(f"\nmetrics.jsonl: {sum(map(len, wanted.values()))} numbers under {len(wanted)} names")
        for name in names:
            series, config = READERS[name](run)
            lines = differences(series, wanted)
            final = series.get("summary/metrics/validation/accuracy")
            count = sum(len(rows) for key, rows in series.items() if not key.startswith("summary/"))
            print(
                f"{name:12} {count} numbers, {len(lines)} names differ, {len(config)} keys of the configuration,",
                end="",
            )
            print(f" final accuracy {final[0][1] if final else 'beside'} (summary.json: {value})")
            print("\n".join(lines[:5]), end="\n" if lines else "")
            wrong += len(lines)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
