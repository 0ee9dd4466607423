"""What a training step costs against rank, adapted modules, sequence length, width and batch: one of them at a time.

    python scripts/bench/scaling.py [--axes rank modules …] [--dropout 0] [--rounds 9] [--device cpu] [--json FILE]
    python scripts/bench/scaling.py --axes modules --points query "query value" all

Every point is one call of step.py's measurement, so the variants are interleaved in one process there, and every figure
is a ratio to the floor of the same point: what the frozen base must do anyway. Beside an axis, the rest stands at
--model, --batch, --length and --rank with all linear layers adapted. A rank is the average at the end: `dora` starts at
1.5 times it and is measured there, in the middle of its schedule; `dora_pruned` after the final choice. A width changes
the feed-forward layer (4 times it) and the number of heads (of 32) along. The JSON file holds `machine`, `versions`,
`settings`, and `results[AXIS][POINT][VARIANT]` as step.py's.
"""

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import step
import torch
from setting import add_model_options
from shapes import SHAPES

VARIANTS = ("floor", "peft_lora", "lora", "dora", "dora_pruned")
HEAD = 32  # width of an attention head

# Axis → its points, as they are typed.
AXES: dict[str, list[str]] = {
    "rank": ["2", "4", "8", "16", "32", "64"],
    "modules": ["query", "query value", "attention", "mlp", "all"],
    "length": ["16", "32", "64", "128", "256"],
    "width": ["128", "256", "384", "768"],
    "batch": ["1", "4", "16", "32"],
}


def at_rank(options: argparse.Namespace, point: str) -> None:
    options.rank = int(point)


def at_modules(options: argparse.Namespace, point: str) -> None:
    options.targets = None if point == "all" else point.split()


def at_length(options: argparse.Namespace, point: str) -> None:
    options.length = int(point)


def at_width(options: argparse.Namespace, point: str) -> None:
    """A shape of its own, beside those of shapes.py."""
    width = int(point)
    heads = max(1, width // HEAD)
    name = f"{options.model}, width {width}"
    SHAPES[name] = {**SHAPES[options.model], "width": width, "inner": 4 * width, "heads": heads}
    options.model = name


def at_batch(options: argparse.Namespace, point: str) -> None:
    options.batch = int(point)


SETTERS: dict[str, Callable[[argparse.Namespace, str], None]] = {
    "rank": at_rank,
    "modules": at_modules,
    "length": at_length,
    "width": at_width,
    "batch": at_batch,
}


def measure_axis(axis: str, points: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Point → variant → seconds and ratios, as ``step.measure`` gives them; prints a line as each is there."""
    results = {}
    print(f"\n{axis:15}{'floor':>9}" + "".join(f"{variant:>12}" for variant in VARIANTS[1:]), flush=True)
    for point in points:
        here = copy.copy(options)
        SETTERS[axis](here, point)
        results[point] = step.measure(here)
        print(line(point, results[point]), flush=True)
    return results


def line(point: str, result: dict[str, Any]) -> str:
    return f"{point:15}{result['floor']['median'] * 1e3:6.1f} ms" + "".join(
        f"{result[variant]['ratios']['floor']:12.3f}" for variant in VARIANTS[1:]
    )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=tuple(AXES))
    parser.add_argument("--points", nargs="+", help="of the one axis that is named, instead of its own")
    parser.add_argument("--model", default="minilm", choices=tuple(SHAPES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=step.RANK)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapter")
    parser.add_argument("--rounds", type=int, default=9)
    add_model_options(parser, "cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(words)
    if options.points and len(options.axes) > 1:
        parser.error("--points are those of one axis: name it with --axes")
    # What step.py's measurement reads beside these.
    options.variants, options.current_dropout = VARIANTS, options.dropout
    options.dtype, options.targets = getattr(torch, options.weights), None
    return options


def main() -> None:
    options = parse()
    print(f"{options.model}, {options.batch} × {options.length} tokens, rank {options.rank}, dropout {options.dropout}")
    print("ratios to the floor of the same row")
    results = {axis: measure_axis(axis, options.points or AXES[axis], options) for axis in options.axes}
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "dtype", "current_dropout")}
        record = {**step.described(options), "settings": settings, "results": results}
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
