"""Where and with what a benchmark ran, and the options that those over models share. Imports nothing heavy."""

import argparse
import ctypes
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def machine() -> dict[str, Any]:
    """The kind of machine: processor, cores this process may use, and what bounds the threads."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = found[1] if found else platform.processor() or platform.machine()
    return {"processor": name, "cores": cores, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def keep_heap() -> None:
    """Have glibc keep freed memory for the rest of this process; elsewhere nothing.

    Between variants that need different amounts it would hand memory back to the kernel and fetch it anew: the larger
    ones then pay tens of thousands of page faults a step that they do not have in a process of their own.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def add_model_options(parser: argparse.ArgumentParser, device: str) -> None:
    """How a step is computed."""
    parser.add_argument("--device", default=device)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="autocast of the forward pass")
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16"), help="type of the frozen base")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--json", type=Path, help="write the figures here too")
