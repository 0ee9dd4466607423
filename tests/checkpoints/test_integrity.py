"""What we wrote and what became of it: a changed file of an adapter or a merged model is noticed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.manifest import verify_if_listed, write_manifest
from dora_cli.checkpoints.merge import merge
from dora_cli.checkpoints.run_state import load_checkpoint, save_checkpoint
from dora_cli.cli.eval import main as dora_eval
from dora_cli.errors import UserError

MakeCase = Callable[..., Any]  # tests/checkpoints/conftest.py


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_one_bit_of_an_adapter(make_case: MakeCase, tmp_path: Path) -> None:
    adapter = make_case("bert").write(tmp_path / "adapter")
    read_adapter(adapter)
    for name in ("adapter_model.safetensors", "adapter_config.json", "method.json"):
        flip(adapter / name, -3)
        with pytest.raises(UserError, match=f"{name} has its .* bytes, but not the content it had") as caught:
            read_adapter(adapter)
        assert "delete its manifest.json if it was changed on purpose" in str(caught.value.hint)
        flip(adapter / name, -3)
    read_adapter(adapter)


def test_a_file_of_ones_own_beside_it_and_no_manifest_are_fine(make_case: MakeCase, tmp_path: Path) -> None:
    adapter = make_case("bert").write(tmp_path / "adapter")
    (adapter / "README.md").write_text("A card.")
    read_adapter(adapter)
    flip(adapter / "adapter_model.safetensors", -3)
    (adapter / "manifest.json").unlink()
    assert len(read_adapter(adapter).modules)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"../x": {"bytes": 1, "sha256": "0"}}}'])
def test_a_damaged_manifest(content: str, make_case: MakeCase, tmp_path: Path) -> None:
    adapter = make_case("bert").write(tmp_path / "adapter")
    (adapter / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        read_adapter(adapter)


def test_one_bit_of_a_merged_model(
    make_case: MakeCase, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_case("bert").write(tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", shard_size="4KB")
    verify_if_listed(tmp_path / "merged")
    shard = sorted((tmp_path / "merged").glob("model-*.safetensors"))[-1]
    flip(shard, -1)
    assert dora_eval([f"checkpoint={tmp_path}/merged", "recipe=text_classification", f"data.path={data_dir}"]) == 2
    assert f"{shard.name} has its" in capsys.readouterr().err
    with pytest.raises(UserError, match=shard.name):
        verify_if_listed(tmp_path / "merged")
    with pytest.raises(UserError, match=shard.name):
        merge(adapter, tmp_path / "again", base=str(tmp_path / "merged"))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("state.json", b"{"), ("state.json", b"null"), ("model.safetensors", bytes(20))]
)
def test_a_checkpoint_whose_manifest_agrees_with_nonsense(name: str, content: bytes, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 2, {"model": {"w": torch.ones(2)}}, {"format": 2}, keep_last=1)
    assert load_checkpoint(path)[1] == {"format": 2}
    (path / name).write_bytes(content)
    write_manifest(path)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        load_checkpoint(path)


def test_numbers_that_are_finite_in_the_file_only(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 100}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for a, b in ((1e300, 1.0), (1.0, 1e38)):  # too large for float32 at once, and once scaled
        tensors = {"A": torch.full((1, 2), a, dtype=torch.float64), "B": torch.full((2, 1), b, dtype=torch.float64)}
        named = {f"base_model.model.x.lora_{key}.weight": value for key, value in tensors.items()}
        save_file(named, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match="not finite"):
            read_adapter(tmp_path).modules["x"]
