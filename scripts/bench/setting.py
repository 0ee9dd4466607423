"""Where and with what a benchmark ran, and the options that those over models share. Imports nothing heavy."""

import argparse
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft")


def machine() -> dict[str, Any]:
    """The kind of machine: processor, cores this process may use, and what bounds the threads."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = found[1] if found else platform.processor() or platform.machine()
    return {"processor": name, "cores": cores, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def add_model_options(parser: argparse.ArgumentParser, device: str) -> None:
    """How a step is computed."""
    parser.add_argument("--device", default=device)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="autocast of the forward pass")
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16"), help="type of the frozen base")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--json", type=Path, help="write the figures here too")
