"""Merging against copying: seconds and peak resident memory, for a sharded bfloat16 base and one four times as large.

    python scripts/bench/merge.py [--folder DIR] [--rounds 3] [--times 1 4] [--json FILE]

A base in the shape of a Llama (hidden 2048, feed-forward 8192, 12 layers, 1.74 GB in shards of 0.5 GB) and a rank-8
adapter on all linear layers are made in a folder that is removed at the end; it needs 3.5 GB, and 13.5 GB for the
larger one. Each round copies with `cp -r`, then merges in a process of its own, both from a warm page cache.
`copy + sync` flushes the copy to the disk, as a merge does.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from setting import machine, versions

from dora_cli.checkpoints.adapter_format import LowRank, write_adapter
from dora_cli.checkpoints.safetensors_io import write_header

HIDDEN, INNER, LAYERS, VOCABULARY, RANK = 2048, 8192, 12, 32000, 8
LAYERS_PER_SHARD = 4


def targets(layers: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """(full name, d_out, d_in) of every linear layer."""
    for i in layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{i}.self_attn.{name}", HIDDEN, HIDDEN
        yield f"model.layers.{i}.mlp.gate_proj", INNER, HIDDEN
        yield f"model.layers.{i}.mlp.up_proj", INNER, HIDDEN
        yield f"model.layers.{i}.mlp.down_proj", HIDDEN, INNER


def make_base(folder: Path, layers: int) -> None:
    """Random weights of the scale of trained ones, written shard by shard."""
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    places: dict[str, str] = {}
    for start in range(0, layers, LAYERS_PER_SHARD):
        file = folder / f"model-{start // LAYERS_PER_SHARD + 1:05d}.safetensors"
        tensors = [(f"{n}.weight", "BF16", (o, i)) for n, o, i in targets(range(start, start + LAYERS_PER_SHARD))]
        if start == 0:
            tensors.insert(0, ("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)))
        starts = write_header(file, tensors)
        places |= dict.fromkeys(starts, file.name)
        with open(file, "r+b") as stream:
            for name, _, shape in tensors:
                stream.seek(starts[name])
                stream.write((torch.randn(shape) * 0.02).bfloat16().view(torch.uint8).numpy().data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def make_adapter(folder: Path, base: Path, layers: int) -> None:
    modules = [
        LowRank(name, torch.randn(RANK, d_in) * 0.01, torch.randn(d_out, RANK) * 0.01)
        for name, d_out, d_in in targets(range(layers))
    ]
    write_adapter(
        folder, modules=modules, head={}, head_modules=[], base_name=str(base), task_type="CAUSAL_LM", method={}
    )


# The kernel counts the parent's memory into a child's ru_maxrss at exec; VmHWM begins anew.
MERGE = """
import sys
from dora_cli.cli.merge import main
code = main(sys.argv[1:])
if sys.platform == "linux":
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def timed(command: list[str], sync: Path | None = None) -> tuple[float, float]:
    """Seconds, and peak resident MiB where the command prints them, of a command that has to succeed."""
    start = time.perf_counter()
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for file in sync.glob("*") if sync else ():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    peak = re.search(r"VmHWM:\s+(\d+) kB", printed)
    return seconds, int(peak[1]) / 1024 if peak else 0.0


def measure(folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    make_base(base, layers)
    make_adapter(adapter, base, layers)
    commands = {
        "copy": (["cp", "-r", str(base), str(out)], None),
        "copy + sync": (["cp", "-r", str(base), str(out)], out),
        "merge": ([sys.executable, "-c", MERGE, f"checkpoint={adapter}", f"out={out}"], None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory = 0.0
    for _ in range(rounds + 1):  # the first one warms the page cache
        for name, (command, sync) in commands.items():
            os.sync()
            took, peak = timed(command, sync)
            seconds[name].append(took)
            memory = max(memory, peak)
            shutil.rmtree(out)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    target = 2.5 * median["copy"] + 4
    return {
        "bytes": size,
        "shards": -(-layers // LAYERS_PER_SHARD),
        "seconds": {name: values[1:] for name, values in seconds.items()},
        "median": median,
        "target_seconds": target,
        "peak_mib": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: the temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4], help="sizes, as multiples of 12 layers")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    arguments = parser.parse_args()
    results = []
    print(f"{'base':>8} {'shards':>6} {'copy':>7} {'copy+sync':>9} {'merge':>7} {'target':>7} {'peak':>9}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for times in arguments.times:
            result = measure(Path(folder), LAYERS * times, arguments.rounds)
            results.append(result)
            copy, sync, merge = (result["median"][name] for name in ("copy", "copy + sync", "merge"))
            print(
                f"{result['bytes'] / 1e9:5.2f} GB {result['shards']:6d} {copy:5.2f} s {sync:7.2f} s {merge:5.2f} s "
                f"{result['target_seconds']:5.2f} s {result['peak_mib']:5.0f} MiB",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "versions": versions("torch"), "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
