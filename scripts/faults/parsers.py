"""What ``fuzz.py`` tries: for each parser its inputs, the call, and what a result must hold.

A check returns where the input was taken, raises a UserError where it was refused, and anything else where it is wrong.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import mutations
import torch
import yaml
from hypothesis import strategies as st
from rows import data_files

from dora_cli.allocation import budget as budgets
from dora_cli.checkpoints.adapter_file import Square, read_adapter
from dora_cli.checkpoints.manifest import write_manifest
from dora_cli.checkpoints.run_state import load_checkpoint, newest_checkpoint, save_checkpoint
from dora_cli.checkpoints.safetensors_io import DTYPES
from dora_cli.cli.parts import load_parts
from dora_cli.cli.run import split_flags
from dora_cli.config import overrides as words
from dora_cli.config.check import known_keys
from dora_cli.config.compose import compose, root_schema
from dora_cli.config.recipes import GROUPS, check_names, recipes_dir, search_folders
from dora_cli.models.targets import find_targets, is_linear


@dataclass
class Target:
    """``examples``: how many by default, about a minute or two of them."""

    name: str
    strategy: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    examples: int


# ---- budgets -------------------------------------------------------------------------------------------------------
def budget_values() -> st.SearchStrategy[Any]:
    number = st.floats().map(repr) | st.integers(-3, 10**9).map(str) | st.text("0123456789.e+-_", max_size=8)
    text = st.tuples(
        st.sampled_from(["", "r", "R", " ", "-"]), number, st.sampled_from(["", "k", "K", "m", "b", "%", " "])
    )
    likely = st.sampled_from(["0.1", "r8", "r0.5", "50k", "0.5m", "1b", 0.2, 300, "2000"])
    return likely | text.map("".join) | st.floats() | st.integers() | mutations.odd_values()


def budget(folder: Path) -> Target:
    costs = st.lists(st.integers(1, 8192) | st.integers(1, 10**9), min_size=1, max_size=8)
    rank = st.none() | st.integers(1, 64)
    modes = st.sampled_from(["shrink", "grow", "static"])
    return Target("budget", st.tuples(budget_values(), costs, rank, modes), check_budget, 10_000)


def check_budget(example: tuple[Any, list[int], int | None, str]) -> None:
    value, costs, rank, mode = example
    parsed = budgets.parse_budget(value)
    if parsed is None:
        assert value is None
        return
    said = re.fullmatch(r"(r?)([0-9.]+(?:e[+-]?[0-9]+)?)([kmb]?)", str(value).strip().lower())
    assert said, "read, though it has none of the forms"
    amount = Decimal(said[2]) * budgets.SUFFIXES[said[3]]
    kind = "average" if said[1] else "params" if said[3] or amount >= 1 else "share"
    assert parsed.kind == kind, f"read as {parsed}"
    assert 0 < parsed.value < math.inf
    assert math.isclose(parsed.value, amount, rel_tol=1e-9, abs_tol=0.5 if kind == "params" else 0)
    budgets.check_reachable(parsed, mode, rank, method="x")
    start = rank if rank is not None else parsed.start_rank(costs)
    target = budgets.resolve(parsed, costs, start, shrinks=mode == "shrink")
    assert target.limit >= (min(costs) if target.by_cost else 1)
    if mode == "shrink":
        assert start and target.limit <= start * (sum(costs) if target.by_cost else len(costs))
    ranks = budgets.spread(target, costs)
    assert len(ranks) == len(costs) and min(ranks) >= 0 and max(ranks) - min(ranks) <= 1
    spent = sum(r * c for r, c in zip(ranks, costs, strict=True)) if target.by_cost else sum(ranks)
    assert target.limit - (max(costs) if target.by_cost else 1) < spent <= target.limit


# ---- target modules ------------------------------------------------------------------------------------------------
def patterns(names: list[str]) -> st.SearchStrategy[Any]:
    """Names, ends, expressions and their mixtures; no nested repeats, which may take Python's matcher for ever."""
    parts = sorted({part for name in names for part in name.split(".")})
    end = st.sampled_from(names).flatmap(lambda name: st.integers(0, 6).map(lambda n: ".".join(name.split(".")[n:])))
    piece = st.sampled_from([*parts, ".", ".*", "\\d", "(", ")", "|", "[0-9]", "?", "^", "$", "\\", "+", "{2}", "(?i)"])
    expression = st.lists(piece, min_size=1, max_size=5).map("".join)
    one = end | end | expression | expression.map("re:{}".format) | st.sampled_from(["attention", "mlp", "re:"])
    one |= st.sampled_from(mutations.TEXTS).filter(lambda text: "*)*" not in text) | st.text(max_size=6)
    return one | st.lists(one, max_size=4) | st.none() | st.lists(one | mutations.odd_values(), max_size=3)


def targets(folder: Path) -> Target:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=8, max_position_embeddings=8, **sizes))
    names = [name for name, _ in model.named_modules()]
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    inside = [name for name in linear if ".layer." in name]

    def check(pattern: Any) -> None:
        found = find_targets(model, pattern, exclude=["classifier"])
        assert found and found == [name for name in linear if name in found and name != "classifier"]
        asked = pattern if isinstance(pattern, list) else [pattern]
        for name in inside:
            assert (name in found) == any(chooses(one, name) for one in asked), name

    return Target("targets", patterns(names), check, 8_000)


def chooses(pattern: str | None, name: str) -> bool:
    """Whether a pattern means a linear layer inside the transformer layers, by the words of the documentation."""
    if pattern is None:
        return True
    if pattern.startswith("re:") or re.search(r"[*+?()\[\]{}|^$\\]", pattern):
        return re.compile(pattern.removeprefix("re:")).fullmatch(name) is not None
    if pattern in ("attention", "mlp"):
        return (".attention." in name) == (pattern == "attention")
    return f".{name}".endswith(f".{pattern}")


# ---- adapter folders -----------------------------------------------------------------------------------------------
MODULES = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.output.dense"]
LORA = {
    "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "x", "r": 2, "lora_alpha": 4,
    "bias": "none", "target_modules": MODULES, "rank_pattern": {"output.dense": 3},
    "alpha_pattern": {"output.dense": 1.5}, "modules_to_save": ["classifier"], "fan_in_fan_out": False,
}  # fmt: skip
KEPT = {f"{MODULES[0]}.lora_E": [True, False, True, False], f"{MODULES[1]}.lora_E": [True, True, True, False]}
SIDES = {name: {"side": 2 + 2 * i, "d_out": 4, "d_in": 6} for i, name in enumerate(MODULES)}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dora": {**LORA, "use_dora": True, "use_rslora": True},
    "adalora": {**LORA, "peft_type": "ADALORA", "init_r": 4, "target_r": 2, "rank_pattern": KEPT},
    "mora": {"peft_type": "MORA", "kind": "rotation", "modules": SIDES},
    "full": {"peft_type": "FULL", "modules_to_save": ["classifier"]},
}


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    if kind == "full":
        return {"bert.pooler.bias": (4,), "classifier.weight": (2, 4), "classifier.bias": (2,)}
    made: dict[str, tuple[int, ...]] = {"base_model.model.classifier.weight": (2, 4)}
    for i, module in enumerate(MODULES):
        end = "" if kind == "adalora" else ".weight"
        parts = {f"lora_A{end}": (2 + i, 6), f"lora_B{end}": (4, 2 + i)}
        parts |= (
            {"lora_E": (2 + i, 1)} if kind == "adalora" else {"lora_magnitude_vector": (4,)} if kind == "dora" else {}
        )
        parts = {"mora_M": (2 + 2 * i, 2 + 2 * i)} if kind == "mora" else parts
        made |= {f"base_model.model.{module}.{part}": shape for part, shape in parts.items()}
    return made


def adapters(folder: Path) -> Target:
    kind, numbers = st.sampled_from(list(CONFIGS)), st.sampled_from(["F32", "F32", "F32", "F64", "F16", "BF16", "I32"])
    changes = mutations.edits(3), mutations.edits(2), mutations.byte_edits(1), mutations.byte_edits(1)
    example = st.tuples(kind, numbers, st.sampled_from([1.0, 1.0, 1e38, 1e300, 1e-45]), *changes)

    def check(example: Any) -> None:
        kind, numbers, size, changes, header_changes, config_edits, weight_edits = example
        config = json.dumps(mutations.edit(CONFIGS[kind], changes)).encode()
        (folder / "adapter_config.json").write_bytes(mutations.edit_bytes(config, config_edits))
        content = mutations.edit_bytes(weights(shapes(kind), numbers, size, header_changes), weight_edits)
        (folder / "adapter_model.safetensors").write_bytes(content)
        check_adapter(folder)

    return Target("adapters", example, check, 5_000)


def weights(shapes: dict[str, tuple[int, ...]], numbers: str, size: float, changes: list[Any]) -> bytes:
    """A safetensors file of these shapes and this type, its numbers multiples of ``size``."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, shape in shapes.items():
        count = torch.arange(1, 1 + math.prod(shape), dtype=torch.float64) * size
        values = count.to(DTYPES[numbers]).view(torch.uint8).numpy().tobytes()
        table[name] = {"dtype": numbers, "shape": list(shape), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    header = json.dumps(mutations.edit(table, changes)).encode()
    return len(header).to_bytes(8, "little") + header + data


def check_adapter(folder: Path) -> None:
    adapter = read_adapter(folder)
    config = json.loads((folder / "adapter_config.json").read_bytes())
    theirs = by_safetensors(folder / "adapter_model.safetensors")
    for name, update in adapter.modules.items():
        tensors = (
            [update.m]
            if isinstance(update, Square)
            else [update.a, update.b, *([update.magnitude] if hasattr(update, "magnitude") else [])]
        )
        assert all(torch.isfinite(t).all() and t.dtype == torch.float32 for t in tensors), name
        part = adapter.modules.parts[name]
        assert part.rank == update.rank == wanted_rank(config, name), name
        assert update.shape == part.shape
        if isinstance(update, Square):
            assert update.m.shape == (update.rank, update.rank)
        else:
            assert update.a.shape == (update.rank, update.shape[1]) and update.b.shape == (update.shape[0], update.rank)
            raw = theirs and theirs.get(part.b.name)
            assert raw is None or torch.allclose(update.b, (raw.double() * part.scale).float()), name
    for parts in (adapter.head, adapter.replaced):
        for name, tensor in parts.items():
            raw = theirs and theirs.get(parts.parts[name].name)
            assert raw is None or (raw.dtype == tensor.dtype and torch.equal(raw, tensor)), name


def wanted_rank(config: dict[str, Any], name: str) -> int:
    """As PEFT finds it."""
    if config["peft_type"] == "MORA":
        return config["modules"][name]["side"]
    table = config.get("rank_pattern") or {}
    if config["peft_type"] == "ADALORA":
        start = 12 if config.get("init_r") is None else config["init_r"]
        return sum(table.get(f"{name}.lora_E", [True] * start))
    default = 8 if config.get("r") is None else config["r"]
    return next((rank for pattern, rank in table.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)


def by_safetensors(file: Path) -> dict[str, torch.Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(file.read_bytes())
    except (SafetensorError, ValueError, KeyError, RuntimeError):
        return None


# ---- recipes and overrides -----------------------------------------------------------------------------------------
def override_lines(keys: list[str]) -> st.SearchStrategy[str]:
    key = st.sampled_from([*keys, *GROUPS, "data.columns.text", "nowhere", "train.nowhere"])
    likely = st.sampled_from(
        ["1", "0.5", "null", "true", "lora", "[a,b]", "{a: b}", "1,2", "range(1,3)", "'a,b'", "dora", "r4", "cpu"]
    )
    value = (
        likely
        | likely
        | st.sampled_from(mutations.TEXTS)
        | st.sampled_from(mutations.NUMBERS).map(str)
        | st.text(max_size=8)
    )
    mark = st.sampled_from(["", "", "", "", "+", "++", "~", "-", " "])
    return st.builds(lambda m, k, v: f"{m}{k}={v}", mark, key, value) | st.text(max_size=10)


def recipes(folder: Path) -> Target:
    parts = load_parts()
    keys = list(known_keys(root_schema(parts)))
    base = ["recipe=text_classification", "data.path=x"]
    texts = [
        *(file.read_text() for file in sorted((recipes_dir() / "recipe").glob("*.yaml"))[-3:]),
        compose(base, parts).yaml,
    ]
    texts = [text if "data.path" in text or "path:" in text else f"{text}\nout: x\n" for text in texts]
    example = st.tuples(
        st.sampled_from(texts), mutations.edits(2), mutations.byte_edits(2), st.lists(override_lines(keys), max_size=1)
    )

    def check(example: Any) -> None:
        text, changes, byte_changes, lines = example
        head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        body = yaml.safe_dump(mutations.edit(yaml.safe_load(text), changes), sort_keys=False) if changes else text
        content = f"{head}\n{body}".encode("utf-8", "surrogatepass") if changes else text.encode()
        (folder / "fuzzed.yaml").write_bytes(mutations.edit_bytes(content, byte_changes))
        composed = compose([f"recipe={folder / 'fuzzed.yaml'}", "data.path=x", *lines], parts)
        (folder / "again.yaml").write_text(composed.yaml, encoding="utf-8", errors="surrogatepass")
        again = compose([f"recipe={folder / 'again.yaml'}"], parts)
        assert again.yaml == composed.yaml, "its record makes another configuration"

    return Target("recipes", example, check, 150)


def overrides(folder: Path) -> Target:
    keys = known_keys(root_schema(load_parts()))
    flags = st.sampled_from(["-m", "--help", "--config-dir", f"--config-dir={folder}", "-x", "--version=1"])
    example = st.lists(override_lines(list(keys)) | override_lines(list(keys)) | flags, min_size=1, max_size=3)

    def check(argv: list[str]) -> None:
        arguments = split_flags(argv)
        folders = search_folders(arguments.config_dirs)
        check_names(arguments.overrides, folders)
        if arguments.multirun:
            shared, axes = words.parse_sweep(arguments.overrides, keys, folders)
            assert len({*(words.split(line)[0] for line in shared), *axes}) == len(shared) + len(axes)
            assert all(values for values in axes.values())
            return
        for override in words.parse(arguments.overrides, keys):
            read = words.OverridesParser.create().parse_overrides([override.line])[0]
            assert read.key_or_group == override.key
            value = read.value()
            assert same_value(str(value) if isinstance(value, words.QuotedString) else value, override.value)

    return Target("overrides", example, check, 8_000)


def same_value(value: Any, other: Any) -> bool:
    return repr(getattr(value, "text", value)) == repr(getattr(other, "text", other))


# ---- checkpoints ---------------------------------------------------------------------------------------------------
def checkpoints(folder: Path) -> Target:
    rest = {
        "format": 2,
        "data": "0" * 64,
        "progress": {"step": 4, "best": None},
        "random": {"python": [3, [1, 2], None]},
    }
    for step in (2, 4):
        save_checkpoint(
            folder, step, {"model": {"w": torch.ones(2, 3)}, "random": {"cpu": torch.arange(4)}}, rest, keep_last=2
        )
    newest = folder / "step-00000004"
    whole = {file.name: file.read_bytes() for file in newest.iterdir()}
    name = st.sampled_from(sorted(whole))
    example = st.tuples(name, mutations.edits(2), mutations.byte_edits(2), st.booleans())

    def check(example: Any) -> None:
        name, changes, byte_changes, listed = example
        content = whole[name]
        if changes and name.endswith(".json"):
            content = json.dumps(mutations.edit(json.loads(content), changes)).encode()
        content = mutations.edit_bytes(content, byte_changes)
        for other, kept in whole.items():
            (newest / other).write_bytes(content if other == name else kept)
        if listed and name != "manifest.json":
            write_manifest(newest)
        path, damaged = newest_checkpoint(folder)
        assert path is not None and path.name == ("step-00000002" if damaged else newest.name)
        assert all(text.strip() and len(text) < 1000 and text.count("\n") < 6 for text in damaged), damaged
        if listed or damaged:
            assert not (listed and damaged and name != "manifest.json"), damaged
        elif name != "manifest.json":
            assert content == whole[name], "believed, though it is not what was written"
        tensors, state = load_checkpoint(path)
        assert isinstance(state, dict)
        if name != "state.json":
            assert state == rest
        if not name.endswith(".safetensors"):
            assert torch.equal(tensors["model"]["w"], torch.ones(2, 3))

    return Target("checkpoints", example, check, 2_000)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "budget": budget, "targets": targets, "adapters": adapters, "data": data_files(Target), "recipes": recipes,
    "overrides": overrides, "checkpoints": checkpoints,
}  # fmt: skip
