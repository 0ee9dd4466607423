"""``metrics.jsonl``: one JSON object a line, appended as the run goes and cut back to a checkpoint on resume."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALLOCATION = "allocation"  # the "split" of allocation events


class MetricsFile:
    """Appends records; each line is flushed when it is written.

    Args:
        path: the file.
        start: the file as it was when the checkpoint was written from which the run goes on; None starts a new one.
        copy: is handed each record that is written.
    """

    def __init__(
        self, path: Path, start: Path | None = None, copy: Callable[[dict[str, Any]], None] = lambda record: None
    ) -> None:
        self.path, self._copy = path, copy
        records = read_metrics(start) if start is not None else []
        partial = path.with_name(f".{path.name}.tmp")  # one run per folder: nobody else writes it
        partial.write_text("".join(map(_line, records)), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()
        self._copy(record)

    def sync(self) -> None:
        """Make what is written survive a crash of the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def read_events(path: Path) -> list[dict[str, Any]]:
    """The allocation events among the records, without what only ``metrics.jsonl`` has: how the units stood."""
    events = (r for r in read_metrics(path) if r["split"] == ALLOCATION)
    return [{k: v for k, v in r.items() if k not in ("split", "standing")} for r in events]


def jsonable(value: Any) -> Any:
    """The same with null for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict[str, Any]) -> str:
    return json.dumps(jsonable(record)) + "\n"
