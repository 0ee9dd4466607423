"""Training on a packed base of any size, built packed: tokens a second and the peak of memory.

    python scripts/bench/quantised.py --device cuda --kind bnb_nf4 --precision bf16 --checkpointing
    python scripts/bench/quantised.py --model tiny-llama --batch 2 --length 16 --steps 2          (here, on a CPU)

Weights are random. Each linear layer is made and packed on the device before the next one, so that the base never
exists unpacked as a whole; embeddings, head and norms are of --weights.
"""

import argparse
import json
import time
from functools import partial
from typing import Any

import torch
from setting import PACKAGES, add_model_options, machine, versions
from shapes import build_base, config_of, random_batch
from torch import nn

from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import inject
from dora_cli.models.quantised import KINDS, STORED, held_bytes, require_package, settle, weight_count
from dora_cli.models.targets import find_targets
from dora_cli.modes import autocast
from dora_cli.training.summary import peak_device_mib, peak_rss_mib


def packed_layer(plain: nn.Linear, kind: str, dtype: torch.dtype, compute: torch.dtype, device: torch.device) -> Any:
    """A packed linear layer of the shape of ``plain``, of random weights."""
    shape = plain.in_features, plain.out_features
    dense = nn.Linear(*shape, bias=plain.bias is not None, device=device, dtype=dtype)
    if kind == "ao_int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(dense, Int8WeightOnlyConfig())
        return dense
    import bitsandbytes as bnb

    if kind == "bnb_int8":
        layer: Any = bnb.nn.Linear8bitLt(*shape, plain.bias is not None, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(dense.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*shape, plain.bias is not None, compute, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = dense.bias
    return layer.to(device)  # packs


def build(options: argparse.Namespace) -> tuple[Any, int]:
    """The frozen model, packed, and the size of its vocabulary."""
    device, dtype = torch.device(options.device), getattr(torch, options.weights)
    compute = torch.bfloat16 if options.precision == "bf16" else torch.float32
    model, vocabulary = build_base(options.model, dtype, torch.device("meta"))
    for name in find_targets(model, None, []):
        model.set_submodule(name, packed_layer(model.get_submodule(name), options.kind, dtype, compute, device))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:  # embeddings, head, norms
                module.register_parameter(name, nn.Parameter(torch.full_like(parameter, 1.0, device=device)))
                if parameter.dim() > 1:
                    nn.init.normal_(module.get_parameter(name), std=0.02)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)  # its frequencies are no parameters
    model.tie_weights()
    model.config.quantization_config = None
    settle(model, STORED, compute, options.model)
    return model.requires_grad_(False), vocabulary


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-8b", help="one of shapes.SHAPES, or a folder with a configuration")
    parser.add_argument("--kind", default="bnb_nf4", choices=tuple(KINDS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8, help="timed, after two that are not")
    add_model_options(parser, "cpu")
    options = parser.parse_args(argv)
    require_package(options.kind)
    model, vocabulary = build(options)
    device = torch.device(options.device)
    base = held_bytes(model)
    built = peak_device_mib(device)
    count = weight_count(model)
    layers = inject(model, targets := find_targets(model, None, []), Components(), [options.rank] * len(targets))
    model.train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for layer in layers.values() for p in layer.adapter_parameters().values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    forward = torch.compile(model) if options.compile else model
    batch = random_batch(vocabulary, options)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    losses = []
    for step in range(options.steps + 2):
        if step == 2:
            wait()
            begin = time.perf_counter()
        with autocast(device, torch.bfloat16 if options.precision == "bf16" else None):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    wait()
    seconds = (time.perf_counter() - begin) / options.steps
    found = {
        "model": config_of(options.model).to_diff_dict(),
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "weights": count,
        "base_bytes": base,
        "seconds_per_step": seconds,
        "tokens_per_second": options.batch * options.length / seconds,
        "peak_device_mib_when_built": built,
        "peak_device_mib": peak_device_mib(device),
        "peak_rss_mib": peak_rss_mib(),
        "losses": [round(float(loss), 4) for loss in losses],
        "machine": machine() | ({"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "versions": versions(*PACKAGES, KINDS[options.kind].package),
    }
    print(f"{count:,} weights held in {base / 1e9:,.2f} GB ({options.kind})")
    print(f"{found['tokens_per_second']:,.0f} tokens/s, {seconds:.3f} s a step of {options.batch} × {options.length}")
    peak = found["peak_device_mib"] or found["peak_rss_mib"]
    print(f"peak {peak / 1024:,.2f} GiB" + (f" on {device}" if device.type == "cuda" else " of the process"))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
