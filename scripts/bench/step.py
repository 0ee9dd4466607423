"""One training step, ours and PEFT's, interleaved in one process: medians, and ratios within rounds.

    python scripts/bench/step.py [--model SHAPE_OR_FOLDER] [--batch 16] [--length 64] [--dropout 0 0.1]
                                 [--variants …] [--rounds 15] [--device cpu] [--memory] [--json FILE]

The floor is what a frozen base must do anyway: its forward pass and the backward pass through its activations, with no
weight gradients. Every other variant takes a whole step: forward, backward, clipping, fused AdamW, and what its method
adds. `dora` stands in the middle of its schedule with every rank still trained (revival on), its events falling as in a
real run; `dora_pruned` after the final choice, at an average rank of 8. One step in ten has an event: it weighs in the
column `alloc.`, a mean, not in the medians. Ours are joined where they read the same input, and share one
mask there, as `dora-train` has it; PEFT draws a mask for each module.
Frozen weights are shared between the variants, so that no one has the caches to itself, and no one pays for memory that
another has handed back to the kernel. A round takes each variant once, in an order that rotates; a ratio is the median
of the rounds' own, so that a slow spell of the machine, longer than a round, weighs on both sides. `--memory` runs each
variant in a process of its own and gives the growth of its peak resident memory over the model at rest (on CUDA the
allocator's own peak).
"""

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from setting import PACKAGES, add_model_options, keep_heap, machine, versions
from shapes import SHAPES, build_base, random_batch, twin
from torch import nn

from dora_cli.adapters.base import AdapterLayer
from dora_cli.adapters.components import Components
from dora_cli.adapters.dropout import Masks, attach
from dora_cli.adapters.inject import inject
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.siblings import join
from dora_cli.adapters.svd import Svd
from dora_cli.adapters.weight_decomposed import WeightDecomposed
from dora_cli.allocation.allocators.prune import Prune
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.component_norm import ComponentNorm
from dora_cli.allocation.importance.sensitivity import Sensitivity
from dora_cli.allocation.regularizers.dem import Dem
from dora_cli.allocation.regularizers.orthogonal import Orthogonal
from dora_cli.allocation.schedules import CubicEarly, CubicLate
from dora_cli.models.targets import find_targets
from dora_cli.modes import rehearsing

VARIANTS = (
    "floor", "full", "peft_lora", "lora", "dora", "dora_pruned", "peft_adalora", "adalora",
    "peft_weight_decomposed", "weight_decomposed",
)  # fmt: skip
BASELINES = {"floor": "/ floor", "peft_lora": "/ PEFT L", "peft_adalora": "/ PEFT A"}  # and their headings
RANK = 8  # on average at the end; what shrinks starts at 1.5 times it
TOTAL = 100_000  # steps of the schedule: rounds stay in the middle of it

ADAPTERS: dict[str, Any] = {"lora": Lora, "dora": Components, "adalora": Svd, "weight_decomposed": WeightDecomposed}
PARTS: dict[str, dict[str, Any]] = {  # as in recipes/method/
    "dora": {"schedule": CubicLate, "importance": ComponentNorm, "allocator": Prune, "regularizer": Dem},
    "adalora": {"schedule": CubicEarly, "importance": Sensitivity, "allocator": Prune, "regularizer": Orthogonal},
}


@dataclass
class Hooks:
    """What a method adds to a step: before it, after backward, and after the optimizer."""

    masks: Masks | None = None
    after_backward: Callable[[int], object] = lambda step: None
    after_step: Callable[[int, torch.optim.Optimizer], object] = lambda step, optimizer: None

    def begin(self, step: int) -> None:
        if self.masks is not None:
            self.masks.move(step, 0)


Step = Callable[[], float]  # takes one training step; returns the seconds of it that went to allocation


def make(variant: str, base: nn.Module, batch: dict[str, torch.Tensor], options: argparse.Namespace) -> Step:
    """One variant over the base's weights, ready to step."""
    torch.manual_seed(1)
    dropout = options.current_dropout
    model = copy.deepcopy(base) if variant == "full" else twin(base)
    hooks = Hooks()
    targets = find_targets(model, options.targets, exclude=[])
    if variant == "floor":
        return floor_step(model, batch, options)
    if variant == "full":
        model.requires_grad_(True)
    elif variant.startswith("peft_"):
        model, hooks = peft_model(variant.removeprefix("peft_"), model, targets, dropout, options.rank)
    else:
        hooks = our_hooks(variant, model, targets, dropout, options.rank)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}
        with rehearsing(model), torch.no_grad():
            join(layers, lambda: model(**batch))
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    forward = torch.compile(model) if options.compile else model
    counter = iter(range(int(0.3 * TOTAL), TOTAL))

    def step() -> float:
        number = next(counter)
        hooks.begin(number)
        with autocast(options):
            loss = forward(**batch).loss
        loss.backward()
        begin = time.perf_counter()
        hooks.after_backward(number)
        spent = time.perf_counter() - begin
        torch.nn.utils.clip_grad_norm_([p for p in trained if p.grad is not None], 1.0)
        optimizer.step()
        begin = time.perf_counter()
        hooks.after_step(number, optimizer)
        spent += time.perf_counter() - begin
        optimizer.zero_grad(set_to_none=True)
        return spent

    return step


def floor_step(model: Any, batch: dict[str, torch.Tensor], options: argparse.Namespace) -> Step:
    """Forward, and backward to the outputs of the first layers that an adapter would adapt, without weight gradients.

    Compiled, where such a hook would cut the graph, back to the embeddings' output: a little more.
    """
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    inputs = dict(batch)
    if options.compile:
        embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
        inputs["inputs_embeds"] = embedded.detach().requires_grad_(True)
    else:
        for name in find_targets(model, options.targets, exclude=[]):
            model.get_submodule(name).register_forward_hook(lambda module, args, out: out.requires_grad_())
    forward = torch.compile(model) if options.compile else model

    def step() -> float:
        with autocast(options):
            loss = forward(**inputs).loss
        loss.backward()
        return 0.0

    return step


def start_rank(rank: int) -> int:
    return math.ceil(1.5 * rank)


def peft_model(kind: str, model: Any, targets: list[str], dropout: float, rank: int) -> tuple[Any, Hooks]:
    """PEFT's model at its best: fused AdamW as for the others, no merging, no state for what is not adapted."""
    import peft

    common = {"target_modules": targets, "lora_dropout": dropout, "lora_alpha": rank}
    if kind == "adalora":
        config: Any = peft.AdaLoraConfig(
            **common, init_r=start_rank(rank), target_r=rank, tinit=int(0.15 * TOTAL), tfinal=int(0.5 * TOTAL),
            deltaT=10, total_step=TOTAL, orth_reg_weight=0.1,
        )  # fmt: skip
    else:
        config = peft.LoraConfig(**common, r=rank, use_dora=kind == "weight_decomposed")
    wrapped = peft.get_peft_model(model, config)
    if kind == "adalora":
        return wrapped, Hooks(after_step=lambda step, optimizer: wrapped.base_model.update_and_allocate(step))
    return wrapped, Hooks()


def our_hooks(variant: str, model: nn.Module, targets: list[str], dropout: float, rank: int) -> Hooks:
    """Put adapters into the model; what goes with them."""
    method = {"dora_pruned": "dora"}.get(variant, variant)
    adapter = ADAPTERS[method](dropout=dropout)
    layers = inject(model, targets, adapter, [start_rank(rank) if method in PARTS else rank] * len(targets))
    masks = attach(layers, dropout, seed=1, shared=True)
    if method not in PARTS:
        return Hooks(masks)
    allocation = Allocation(
        layers,
        **{name: part() for name, part in PARTS[method].items()},
        total_steps=TOTAL,
        target=Target(rank * len(targets), by_cost=False),
    )
    for layer in layers.values():  # gates that are open
        torch.nn.init.normal_(layer.c, std=0.02)
    if variant != "dora_pruned":
        return Hooks(masks, allocation.after_backward, allocation.after_step)
    keep = torch.zeros(len(allocation.table), dtype=torch.bool)
    keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))[: allocation.last]] = True
    allocation.table.keep(keep, final=True)
    allocation.table.compact()
    after = allocation.window.end + 1
    return Hooks(
        masks, lambda step: allocation.after_backward(after), lambda step, opt: allocation.after_step(after, opt)
    )


def autocast(options: argparse.Namespace) -> Any:
    return torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.precision == "bf16")


def synchronise(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every round of every variant, interleaved; and allocation's share where there is one."""
    keep_heap()
    device = torch.device(options.device)
    base, vocabulary = build_base(options.model, options.dtype, device)
    batch = random_batch(vocabulary, options)
    steps = {variant: make(variant, base, batch, options) for variant in options.variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    spent: dict[str, list[float]] = {variant: [] for variant in steps}
    names = list(steps)
    for turn in range(options.rounds + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronise(options)
            begin = time.perf_counter()
            allocation = steps[name]()
            synchronise(options)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
                spent[name].append(allocation)
    return {
        name: {
            "seconds": seconds[name],
            "median": statistics.median(seconds[name]),
            "ratios": {other: ratio(seconds[name], seconds[other]) for other in BASELINES if other in seconds},
            # A mean: an event every tenth step counts for a tenth.
            "allocation": statistics.mean(spent[name]),
        }
        for name in names
    }


def ratio(seconds: list[float], baseline: list[float]) -> float:
    """The median over rounds of how many times longer one took than the other."""
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))


def peak_memory(options: argparse.Namespace) -> float:
    """MiB by which one variant's steps raise the peak over the model at rest; for a process of its own."""
    device = torch.device(options.device)
    base, vocabulary = build_base(options.model, options.dtype, device)
    batch = random_batch(vocabulary, options)
    if device.type == "cuda":
        step = make(options.variants[0], base, batch, options)
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_allocated() - rest) / 2**20
    with torch.no_grad():  # what the libraries take for themselves once
        base(**batch)
    step = make(options.variants[0], base, batch, options)
    rest = resident("VmRSS")
    for _ in range(4):
        step()
    return resident("VmHWM") - rest


def resident(what: str) -> float:
    """MiB of this process by the kernel's count (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def in_own_process(variant: str, options: argparse.Namespace) -> float:
    arguments = [sys.executable, __file__, "--peak-of", variant, "--dropout", str(options.current_dropout)]
    for name in ("model", "batch", "length", "rank", "device", "precision", "weights"):
        arguments += [f"--{name}", str(getattr(options, name))]
    arguments += ["--targets", *options.targets] if options.targets else []
    arguments += ["--checkpointing"] * options.checkpointing + ["--compile"] * options.compile
    return float(subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def report(results: dict[str, Any]) -> None:
    print(
        f"{'variant':23}{'median':>10}"
        + "".join(f"{h:>9}" for h in BASELINES.values())
        + f"{'alloc.':>9}{'memory':>10}"
    )
    for name, result in results.items():
        ratios = "".join(f"{result['ratios'][b]:9.3f}" if b in result["ratios"] else " " * 9 for b in BASELINES)
        share = f"{result['allocation'] / result['median']:.2%}" if result["allocation"] > 1e-6 else ""
        memory = f"{result['peak_mib']:.0f} MiB" if "peak_mib" in result else ""
        print(f"{name:23}{result['median'] * 1e3:7.1f} ms{ratios}{share:>9}{memory:>10}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help=f"{', '.join(SHAPES)}, or a folder with a config.json")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=RANK, help="average at the end; shrinking starts at 1.5 times it")
    parser.add_argument("--targets", nargs="+", help="as adapter.targets, e.g. attention; default: all linear layers")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=15)
    add_model_options(parser, "cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", action="store_true", help="measure each variant's peak in a process of its own")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = getattr(torch, options.weights)
    return options


def main() -> None:
    options = parse()
    options.current_dropout = options.dropout[0]
    if options.peak_of:
        options.variants = [options.peak_of]
        print(peak_memory(options))
        return
    results = {}
    for dropout in options.dropout:
        options.current_dropout = dropout
        print(f"\n{options.model}, {options.batch} × {options.length} tokens, adapter dropout {dropout}", flush=True)
        results[str(dropout)] = measure(options)
        for name, result in results[str(dropout)].items():
            if options.memory:
                result["peak_mib"] = in_own_process(name, options)
        report(results[str(dropout)])
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "peak_of", "dtype", "current_dropout")}
        options.json.write_text(json.dumps({**described(options), "settings": settings, "results": results}, indent=1))


def described(options: argparse.Namespace) -> dict[str, Any]:
    """Versions and the kind of machine, for the record."""
    found = {**machine(), "threads": torch.get_num_threads()}
    if options.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    return {"machine": found, "versions": versions(*PACKAGES)}


if __name__ == "__main__":
    main()
