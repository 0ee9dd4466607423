"""What merging refuses, in one message and with no folder left behind."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dora_cli.checkpoints.adapter_format import LowRank, write_adapter, write_full
from dora_cli.checkpoints.merge import merge, parse_size
from dora_cli.errors import UserError

MakeCase = Callable[..., Any]  # tests/checkpoints/conftest.py
KINDS = ["bert", "roberta", "gpt2", "llama"]


def test_a_tied_output_embedding_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("gpt2")
    options = {"head_modules": ["transformer.wte"], "task_type": "CAUSAL_LM", "method": {}}
    case.write(tmp_path / "adapter", head={"transformer.wte.weight": torch.zeros(60, 16)}, **options)
    with pytest.raises(UserError, match="both the input and the output embedding"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_a_base_of_another_size_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    other = tmp_path / "other"
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(other)
    case.write(tmp_path / "noted")
    with pytest.raises(UserError, match=r"does not fit[^$]*hidden_size 16, the base has 32"):
        merge(tmp_path / "noted", tmp_path / "out", base=str(other))
    case.write(tmp_path / "unnoted", method={})
    with pytest.raises(
        UserError, match=r"does not fit[^$]*has the shape \[32, 32\] there, the adapter's has \[16, 16\]"
    ):
        merge(tmp_path / "unnoted", tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_architecture_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    make_case("gpt2", name="other")
    case.write(tmp_path / "adapter", method={})
    with pytest.raises(UserError, match=r"'bert\.encoder\.layer\.0\.\S+' matches nothing in it \(9 of 9 tensors"):
        merge(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "other"))


def test_a_replaced_parameter_of_another_shape_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    tensors = {"bert.embeddings.LayerNorm.weight": torch.ones(17)}
    options: dict[str, Any] = {"head_modules": [], "base_name": str(case.base), "task_type": None}
    write_full(tmp_path / "adapter", tensors, method={"base_model_prefix": "bert"}, **options)
    with pytest.raises(UserError, match=r"has the shape \[16\] there, the adapter's has \[17\]"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_numbers_that_are_not_finite_leave_no_folder(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    next(u for u in case.updates if u.rank).a[0, 0] = float("nan")
    case.write(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"lora_A.weight' holds numbers that are not finite"):
        merge(tmp_path / "adapter", tmp_path / "out")
    head = {name: torch.full_like(tensor, float("inf")) for name, tensor in case.head.items()}
    case.updates = case.updates[:1]
    case.write(tmp_path / "adapter", head=head)
    with pytest.raises(UserError, match=r"classifier\.\w+' holds numbers that are not finite"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_what_a_narrower_type_cannot_hold_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    file = case.base / "model.safetensors"
    tensors = load_file(file)
    tensors["embeddings.word_embeddings.weight"][3, 5] = -65530.0
    tensors["mask"] = torch.tensor([0.0, float("-inf")])  # means what it says, in any type
    save_file(tensors, file)
    case.write(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"word_embeddings\.weight' has numbers too large for float16\n  65530, and"):
        merge(tmp_path / "adapter", tmp_path / "out", dtype="float16")
    tensors["embeddings.word_embeddings.weight"][3, 5] = -65510.0  # rounds to the last one, 65504
    save_file(tensors, file)
    merge(tmp_path / "adapter", tmp_path / "out", dtype="float16")
    merge(tmp_path / "adapter", tmp_path / "kept")


def test_a_folder_that_holds_something_is_refused(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("bert")
    case.write(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    merge(tmp_path / "adapter", tmp_path / "out")  # empty: welcome
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="exists and is not empty"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the folder that you are in"):  # a rename would leave us in none
        merge(tmp_path / "adapter", ".")
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("size", ["0", "5XB", "-1", "five", "", "1e9", "9" * 400])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(UserError, match="shard_size"):
        parse_size(size)


def test_sizes_are_decimal_or_binary_as_written() -> None:
    assert [parse_size(s) for s in ("5GB", "1.5 mb", "2KiB", "77", 12)] == [5 * 10**9, 1_500_000, 2048, 77, 12]


def test_a_mistyped_type_is_answered_with_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        merge(tmp_path, tmp_path / "out", dtype="bfloat")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package://no_such_package_here/model", "'no_such_package_here' is not installed"),
        ("package://peft/no/such/folder", "has no folder"),
        ("package://peft/../torch", "has no folder"),
        ("./no/such/folder", "there is no base model"),
        ("nobody/nothing", "neither a folder here nor"),
    ],
)
def test_a_base_that_is_not_there_is_named(name: str, message: str, make_case: MakeCase, tmp_path: Path) -> None:
    make_case("bert").write(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        merge(tmp_path / "adapter", tmp_path / "out", base=name)


def test_pickled_and_quantised_bases_are_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    case.write(tmp_path / "adapter")
    config = json.loads((case.base / "config.json").read_text())
    (case.base / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(UserError, match="quantised"):
        merge(tmp_path / "adapter", tmp_path / "out")
    (case.base / "config.json").write_text(json.dumps(config))
    (case.base / "model.safetensors").rename(case.base / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights only"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_an_index_that_leads_outside_its_folder_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert", max_shard_size="8KB")
    case.write(tmp_path / "adapter")
    index = case.base / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][min(table["weight_map"])] = "../outside.safetensors"
    index.write_text(json.dumps(table))
    with pytest.raises(UserError, match="should lie in a file of this folder"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_a_truncated_shard_of_the_base_is_named(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert", max_shard_size="8KB")
    case.write(tmp_path / "adapter")
    shard = max(case.base.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        merge(tmp_path / "adapter", tmp_path / "out")


# interruptions


def test_target_with_an_unknown_layout_is_refused_rather_than_guessed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    weights = {"x.weight": torch.ones(4, 6), "y.weight": torch.ones(6, 4), "z.weight": torch.ones(4, 4)}
    save_file(weights, base / "model.safetensors")
    modules = [LowRank(n, torch.ones(1, d), torch.ones(4, 1)) for n, d in (("x", 6), ("y", 6), ("z", 4))]
    options: dict[str, Any] = {"head": {}, "head_modules": [], "task_type": None, "method": {}}
    write_adapter(tmp_path / "adapter", modules=modules, base_name=str(base), **options)
    with pytest.raises(UserError, match=r"cannot tell how 'z\.weight' is stored"):
        merge(tmp_path / "adapter", tmp_path / "out")
