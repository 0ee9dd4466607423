"""Adapters of other tools, written here as those tools write them, merge to the weights that those tools make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.apply import apply_adapter
from dora_cli.checkpoints.formats import FORMATS
from dora_cli.checkpoints.merge import merge
from dora_cli.errors import UserError
from dora_cli.registry import load

MakeCase = Callable[..., Any]  # tests/checkpoints/conftest.py
RANK, SCALE = 3, 2.5
CLOSE = {"rtol": 0, "atol": 2e-6}


def factors(case: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module → PEFT's A (r, d_in) and B (d_out, r), all of one rank."""
    torch.manual_seed(2)
    shapes = {update.name: update.shape for update in case.updates}
    return {name: (torch.randn(RANK, d_in) / 4, torch.randn(d_out, RANK) / 4) for name, (d_out, d_in) in shapes.items()}


def write(folder: Path, config: dict[str, Any], file: str, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    return folder


def mlx(folder: Path, case: Any, kind: str = "lora", **changes: Any) -> Path:
    """As ``mlx_lm.lora`` saves: factors turned over, one scale; of its dora the norms ``m`` too."""
    tensors = {}
    for name, (a, b) in factors(case).items():
        tensors |= {f"{name}.lora_a": a.T, f"{name}.lora_b": b.T}
        if kind == "dora":
            tensors[f"{name}.m"] = torch.arange(1.0, len(b) + 1)
    settings = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    config = {"model": str(case.base), "fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings}
    return write(folder, config | changes, "adapters.safetensors", tensors)


def adapterhub(folder: Path, case: Any, version: str = "adapters.1.2.0", **changes: Any) -> Path:
    """As ``model.save_adapter(folder, "mine", use_safetensors=True)`` saves a LoRA."""
    tensors = {}
    for name, (a, b) in factors(case).items():
        tensors |= {f"{name}.loras.mine.lora_A": a, f"{name}.loras.mine.lora_B": b}
    settings = {
        "architecture": "lora",
        "composition_mode": "add",
        "use_gating": False,
        "r": RANK,
        "alpha": RANK * SCALE,
    }
    config = {"config": settings | changes, "name": "mine", "model_name": str(case.base), "version": version}
    return write(folder, config, "adapter.safetensors", tensors)


def torchtune(folder: Path, case: Any) -> Path:
    """As torchtune's checkpointer hands on to PEFT: these settings and no others."""
    tensors = {}
    for name, (a, b) in factors(case).items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    config = {"r": RANK, "lora_alpha": RANK * SCALE, "target_modules": ["q_proj"], "peft_type": "LORA"}
    return write(folder, config | {"base_model_name_or_path": str(case.base)}, "adapter_model.safetensors", tensors)


@pytest.fixture
def causal(make_case: MakeCase) -> Any:
    """A llama whose base is a language model, as its users have it."""
    return make_case("llama")


@pytest.mark.parametrize("made", [mlx, adapterhub, torchtune])
def test_a_merge_adds_what_the_tool_would(made: Callable[..., Path], causal: Any, tmp_path: Path) -> None:
    report = merge(made(tmp_path / "adapter", causal), tmp_path / "out")
    assert set(report.ranks.values()) == {RANK} and len(report.ranks) == len(causal.updates)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = load_file(causal.base / "model.safetensors"), model.state_dict()
    for name, (a, b) in factors(causal).items():
        expected = before[f"{name}.weight"].double() + SCALE * (b.double() @ a.double())
        torch.testing.assert_close(after[f"{name}.weight"].double(), expected, **CLOSE)
    evaluated = transformers.AutoModelForCausalLM.from_pretrained(causal.base)  # what dora-eval does
    apply_adapter(evaluated, read_adapter(tmp_path / "adapter"))
    torch.testing.assert_close(causal.logits(evaluated), causal.logits(model), rtol=0, atol=2e-5)


def test_mlx_dora_gives_every_output_its_norm(causal: Any, tmp_path: Path) -> None:
    merge(mlx(tmp_path / "adapter", causal, "dora"), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (causal.base, tmp_path / "out"))
    for name, (a, b) in factors(causal).items():
        new = before[f"{name}.weight"].double() + SCALE * (b.double() @ a.double())
        expected = new * (torch.arange(1.0, len(b) + 1) / new.norm(dim=1))[:, None]
        torch.testing.assert_close(after[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_mlx_names_that_are_not_the_bases_are_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("gpt2")  # transformer.h in the file; MLX-LM's own class calls it model.h
    for update in case.updates:
        update.name = update.name.replace("transformer.", "model.")
    with pytest.raises(UserError, match="does not fit the base"):
        merge(mlx(tmp_path / "adapter", case), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapterhub_before_1_1_scaled_by_one(causal: Any, tmp_path: Path) -> None:
    name, (a, b) = next(iter(factors(causal).items()))
    for version, scale in (("adapters.1.0.1", 1.0), ("adapters.1.1.0", SCALE), ("3.2.1", SCALE)):
        update = read_adapter(adapterhub(tmp_path / version, causal, version)).modules[name]
        torch.testing.assert_close(update.b @ update.a, scale * b @ a)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda folder, case: mlx(folder, case, fine_tune_type="full"), "fine_tune_type full"),
        (lambda folder, case: mlx(folder, case, fine_tune_type="dora"), r"has no m"),
        (lambda folder, case: mlx(folder, case, lora_parameters={"rank": 4, "scale": 1.0}), "config.json says 4"),
        (lambda folder, case: mlx(folder, case, lora_parameters={"rank": 3}), "'scale' should be int or float"),
        (lambda folder, case: mlx(folder, case, "dora", fine_tune_type="lora"), "is no part of an adapter"),
        (lambda folder, case: adapterhub(folder, case, use_gating=True), "with gates"),
        (lambda folder, case: adapterhub(folder, case, architecture="prefix_tuning"), "architecture prefix_tuning"),
        (lambda folder, case: adapterhub(folder, case, r=0), "r is 0"),
    ],
)
def test_what_would_give_another_model_is_refused(made: Any, message: str, causal: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_adapter(made(tmp_path / "adapter", causal))


@pytest.mark.parametrize(
    ("made", "pickled", "hint"),
    [(mlx, "adapters.npz", "save_safetensors"), (adapterhub, "pytorch_adapter.bin", "use_safetensors=True")],
)
def test_pickles_are_refused_with_the_tools_own_way_out(
    made: Any, pickled: str, hint: str, causal: Any, tmp_path: Path
) -> None:
    folder = made(tmp_path / "adapter", causal)
    next(folder.glob("*.safetensors")).rename(folder / pickled)
    with pytest.raises(UserError, match="pickled") as caught:
        read_adapter(folder)
    assert hint in str(caught.value.hint)
    with pytest.raises(UserError, match="is a file"):
        read_adapter(folder / pickled)


def test_every_format_is_a_file_of_its_own() -> None:
    assert list(FORMATS)[-1] == "peft"  # which takes what no other knows
    for name, place in FORMATS.items():
        assert place.startswith(f"dora_cli.checkpoints.formats.{name}:")
        assert load(FORMATS, name, key="format").title
