"""``summary.json``: what came out of a run, in numbers (DESIGN 4)."""

import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dora_cli.adapters.base import AdapterLayer
from dora_cli.allocation.controller import Allocation
from dora_cli.training.setup import Composed, Session
from dora_cli.training.sizing import budget_word
from dora_cli.training.state import Progress

MIB = 2**20


def summarise(session: Session, progress: Progress, peak_rss: int, peak_device: int | None) -> dict[str, Any]:
    """The summary of a finished run. Metrics are those of the exported weights; peaks in MiB."""
    table, allocation = session.allocation.table, session.allocation
    chosen = progress.last if session.config.save.which == "last" else progress.best
    chosen = chosen or progress.last
    seconds = max(progress.seconds, 1e-9)
    head = sum(p.numel() for n in session.head_modules for p in session.model.get_submodule(n).parameters())
    head += sum(layer.rows.numel() for layer in session.token_rows.values())
    return {
        "recipe": session.composed.recipe,
        "method": session.composed.method,
        "seed": session.config.seed,
        "budget": {
            "requested": budget_word(session.composed),
            "components_start": allocation.start_count,
            "components_end": int(table.contributing().sum()),
            "params_start": allocation.start_cost,
            "params_end": int(table.cost[table.contributing()].sum()),
        },
        "unit": table.kind if session.layers else "none",  # what components_* count
        "head_params": head,
        "trained_params": sum(p.numel() for p in session.trained_parameters().values()),
        "trained_params_mean": round(progress.trained / max(progress.step - progress.skipped, 1)),  # over its steps
        "metrics": chosen["metrics"] if chosen else {},
        "held_out": session.rows.held_out,  # training rows that validated, other ones for another seed
        "best": _brief(progress.best),
        "last": _brief(progress.last),
        "train": {
            "steps": progress.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "skipped": progress.skipped,
            "seconds": round(progress.seconds, 3),
            "samples_per_second": round(progress.samples / seconds, 2),
            "tokens_per_second": round(progress.tokens / seconds, 1),
            "processes": session.world.size,
            "peak_rss_mib": peak_rss,
            "peak_device_mib": peak_device,
            **({"processes": 2, "traffic": session.traffic.state()} if session.traffic is not None else {}),
        },
        "ranks": rank_map(session),
        "versions": versions(),
    }


def peaks(session: Session) -> tuple[int, int | None]:
    """Peaks in MiB of the process that took the most, in memory and on its device; asked of all of them."""
    on_device = peak_device_mib(session.device)
    told = session.world.exchange([peak_rss_mib(), on_device or 0])
    rss, device = (max(column) for column in zip(*told, strict=True))
    return rss, None if on_device is None else device


class Trained(Protocol):
    """What can be said of trained layers, and be saved of them: of a session, or of somebody's own loop."""

    @property
    def composed(self) -> Composed: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def layers(self) -> Mapping[str, AdapterLayer]: ...
    @property
    def targets(self) -> Sequence[str]: ...
    @property
    def head_modules(self) -> Sequence[str]: ...
    @property
    def allocation(self) -> Allocation: ...
    def trained_parameters(self) -> dict[str, nn.Parameter]: ...


def rank_map(trained: Trained) -> dict[str, int]:
    """Living components of every target module, those without an adapter included."""
    if trained.allocation.table.kind == "components":
        table = trained.allocation.table
        counts = torch.bincount(table.module[table.contributing()], minlength=len(table.names)).tolist()
        living = dict(zip(table.names, counts, strict=True))
    else:
        living = {name: layer.rank if layer.active else 0 for name, layer in trained.layers.items()}
    return {name: living.get(name, 0) for name in trained.targets}


def peak_rss_mib() -> int:
    """Peak resident memory of this process."""
    kernel = kernel_count("VmHWM")
    if kernel is not None:
        return round(kernel / MIB)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (MIB if sys.platform == "darwin" else 1024))  # macOS counts bytes


def kernel_count(name: str) -> int | None:
    """Bytes that Linux says of this process, ``VmRSS`` or ``VmHWM``; None elsewhere.

    ``ru_maxrss`` would begin with what the parent process held.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
    except (OSError, StopIteration):
        return None


def peak_device_mib(device: torch.device) -> int | None:
    return round(torch.cuda.max_memory_allocated(device) / MIB) if device.type == "cuda" else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("dora-cli", "torch", "transformers", "datasets", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            from dora_cli import __version__

            found[package] = __version__ if package == "dora-cli" else "?"
    return found


def _brief(record: dict[str, Any] | None) -> dict[str, Any] | None:
    return {k: record[k] for k in ("step", "name", "value")} if record else None
