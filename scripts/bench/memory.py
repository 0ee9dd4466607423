"""What the dry run says of memory against what runs take: `python scripts/bench/memory.py [--cases NAME …]`

    python scripts/bench/memory.py [--model minilm] [--decoder FOLDER] [--steps 5] [--json FILE]

For every setting one process makes the estimate and another trains a few steps through the real command, evaluates and
exports; its `summary.json` gives the peak (resident memory; on CUDA the allocator's). Rows are made up, longer than
any `data.max_length` here. This process stays small on purpose: what is started from a large one begins with its peak.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = "the film was a story and plot with cast of good bad great awful fine poor lovely dull bright grim".split()  # noqa: SIM905
SMALL = ["data.max_length=64", "train.batch_size=8"]
MIDDLE = ["data.max_length=64", "train.batch_size=32"]
CASES: dict[str, list[str]] = {
    "dora": ["method=dora", "budget=r8", *MIDDLE],
    "lora": ["method=lora", "budget=r8", *MIDDLE],
    "mora": ["method=mora", "budget=r8", *MIDDLE],
    "full": ["method=full", *MIDDLE],
    "full, 8 rows": ["method=full", *SMALL],
    "8 rows": ["method=dora", "budget=r8", *SMALL],
    "64 rows": ["method=dora", "budget=r8", "data.max_length=64", "train.batch_size=64"],
    "8 × 128": ["method=lora", "budget=r8", "data.max_length=128", "train.batch_size=8"],
    "32 × 128": ["method=lora", "budget=r8", "data.max_length=128", "train.batch_size=32"],
    "64 × 128": ["method=lora", "budget=r8", "data.max_length=128", "train.batch_size=64"],
    "dropout": ["method=dora", "budget=r8", "adapter.dropout=0.1", *MIDDLE],
    "checkpointing": ["method=dora", "budget=r8", "train.gradient_checkpointing=true", *MIDDLE],
    "accumulation": ["method=dora", "budget=r8", "train.accumulation=4", *MIDDLE],
    "bf16": ["method=dora", "budget=r8", "train.precision=bf16", *MIDDLE],
    "evaluation": ["method=dora", "budget=r8", "train.eval_batch_size=256", "data.max_eval_samples=256", *SMALL],
    "decoder": ["method=dora", "budget=r8", *SMALL],
}


def write_rows(folder: Path) -> None:
    draw = random.Random(0)
    for split, n in (("train", 2000), ("validation", 300)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for i in range(n):
                text = " ".join(draw.choices(WORDS, k=draw.randint(20, 180)))
                file.write(json.dumps({"text": text, "label": ("negative", "positive")[i % 2]}) + "\n")


def estimate(words: list[str]) -> None:
    """Print the estimate of one setting as JSON; for a process of its own."""
    from dataclasses import asdict

    from dora_cli.cli.parts import load_parts
    from dora_cli.config.compose import compose
    from dora_cli.training import memory
    from dora_cli.training.setup import build

    session = build(compose(words, load_parts()))
    begin = time.perf_counter()
    found = memory.estimate(session)
    print(json.dumps({**asdict(found), "total": found.total, "seconds": time.perf_counter() - begin}))


def measure(name: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Estimate and peak of one setting, in MiB."""
    told = subprocess.run([sys.executable, __file__, "--estimate", *words], stdout=subprocess.PIPE, check=True)
    guess = json.loads(told.stdout.splitlines()[-1])
    out = folder / "run"
    command = [sys.executable, "-m", "dora_cli.cli.train", *words, f"out={out}", "overwrite=true"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    peak = summary["train"]["peak_device_mib"] or summary["train"]["peak_rss_mib"]
    parts = {
        key: guess[key] / 2**20 for key in ("total", "process", "base", "trained", "activations", "gaps", "seconds")
    }
    parts["seconds"] = guess["seconds"]
    off = parts["total"] / peak - 1
    return {"case": name, "overrides": words, "measured": peak, "off": off, "moment": guess["moment"], **parts,
            "versions": summary["versions"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="a model preset, for all cases but `decoder`")
    parser.add_argument("--decoder", help="folder of a decoder; without it that case is left out")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--estimate", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.estimate:
        return estimate(options.estimate)
    results = []
    print(f"{'MiB':16} {'estimate':>9} {'measured':>9} {'off':>6}   process   base trained  activ.    gaps  seconds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        common = ["recipe=text_classification", f"data.path={folder}", f"train.max_steps={options.steps}"]
        for case in options.cases:
            if case == "decoder" and not options.decoder:
                continue
            model = f"model.name={options.decoder}" if case == "decoder" else f"model={options.model}"
            few = [] if case == "evaluation" else ["data.max_eval_samples=32"]
            found = measure(case, [*common, model, *few, *CASES[case]], folder)
            results.append(found)
            print(
                f"{case:16} {found['total']:9,.0f} {found['measured']:9,} {found['off']:6.0%}   "
                + " ".join(f"{found[k]:7,.0f}" for k in ("process", "base", "trained", "activations", "gaps"))
                + f" {found['seconds']:8.1f}",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
