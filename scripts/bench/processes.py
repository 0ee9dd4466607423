"""Two processes against one, started by torchrun on real weights and rows: losses, units, adapters; time and memory.

    python scripts/bench/processes.py model.name=DIR data.path=DIR [KEY=VALUE …] [--methods dora adalora …]
        [--steps 20] [--rows 32] [--processes 2] [--folder DIR] [--json FILE]

The model should have no dropout in its own configuration (``--still`` copies a local one without), since each process
draws its own. Every run has one thread a process, so that two processes have twice the cores of one.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

METHODS = {
    "dora": ["budget=r4", "allocator.interval=3"],
    "adalora": ["budget=r4", "allocator.interval=3"],
    "alora": ["budget=r4", "allocator.interval=5"],
    "aflora": ["budget=r4", "allocator.interval=3", "importance.window=3"],
}
WAYS = {"one": (1, []), "replicated": (None, ["train.shard=none"]), "sharded": (None, ["train.shard=full"])}


def run(words: list[str], processes: int, out: Path) -> dict[str, Any]:
    """One run; what it wrote."""
    start = [sys.executable, "-m", "dora_cli.train"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start += ["-m", "dora_cli.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([*start, *words, f"out={out}"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr[-3000:]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": {(r["step"], r["split"]): r["loss"] for r in records if "loss" in r},
        "units": [(e["step"], e["alive"], e["ranks"]) for e in json.loads((out / "ranks.json").read_text())],
        "deltas": deltas(out / "adapter"),
        "train": json.loads((out / "summary.json").read_text())["train"],
    }


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of each module, and what is trained in full."""
    tensors = load_file(folder / "adapter_model.safetensors")
    products = {name: tensors[name.replace("lora_A", "lora_B")] @ a for name, a in tensors.items() if "lora_A" in name}
    return products | {name: t for name, t in tensors.items() if "lora_" not in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="keys of every run")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--recipe", default="glue_sst2")
    parser.add_argument("--still", type=Path, help="a model's folder, to be copied without dropout")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = [f"recipe={options.recipe}", f"train.max_steps={options.steps}", f"train.batch_size={options.rows}"]
        words += ["train.log_every=1", f"train.eval_every={options.steps // 2}", "adapter.dropout=0", *options.words]
        if options.still:
            words.append(f"model.name={still(options.still, folder / 'model')}")
        for method in options.methods:
            runs = {
                name: run(
                    [*words, f"method={method}", *METHODS[method], *more],
                    n or options.processes,
                    folder / method / name,
                )
                for name, (n, more) in WAYS.items()
            }
            one = runs["one"]
            results[method] = {}
            for name, other in runs.items():
                assert other["losses"].keys() == one["losses"].keys()
                results[method][name] = found = {
                    "loss": max(abs(other["losses"][k] - v) for k, v in one["losses"].items()),
                    "units": other["units"] == one["units"],
                    "delta": max(float((other["deltas"][k] - v).abs().max()) for k, v in one["deltas"].items()),
                    "largest": max(float(v.abs().max()) for v in one["deltas"].values()),
                    "seconds_per_step": other["train"]["seconds"] / other["train"]["steps"],
                    "peak_rss_mib": other["train"]["peak_rss_mib"],
                }
                same = "same units" if found["units"] else "OTHER UNITS"
                print(
                    f"{method:8} {name:10} loss {found['loss']:.1e}  {same}  ΔW and head {found['delta']:.1e} "
                    f"(of {found['largest']:.2g})  {found['seconds_per_step']:.2f} s/step  "
                    f"{found['peak_rss_mib']:,} MiB",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps({"words": words, "results": results}, indent=1))


def still(model: Path, folder: Path) -> Path:
    """A copy of a model without dropout."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {key: 0.0 for key in config if "dropout" in key or "pdrop" in key}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
