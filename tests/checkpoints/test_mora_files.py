"""MoRA's rotation as files: written, read with suspicion, applied and merged with equal logits."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dora_cli.adapters.base import linear_shape
from dora_cli.adapters.inject import inject
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.mora import rotation_delta
from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.adapter_format import Square, write_square
from dora_cli.checkpoints.apply import apply_adapter, start_from
from dora_cli.checkpoints.merge import merge
from dora_cli.cli.merge import main as dora_merge
from dora_cli.errors import UserError

MakeCase = Callable[..., Any]  # tests/checkpoints/conftest.py
KINDS = ["bert", "roberta", "gpt2", "llama"]
pytestmark = pytest.mark.usefixtures("unlisted")
SIDES = (0, 6, 8, 10)  # of 16 and 24: those that divide and those that do not


def squares(case: Any) -> list[Square]:
    found = []
    for i, update in enumerate(case.updates):
        side = SIDES[i % 4]
        m = torch.randn(side, side) / 4
        shape = linear_shape(case.model.get_submodule(update.name))
        found.append(Square(update.name, m, shape, update.transposed))
    return found


def write(case: Any, folder: Path, modules: list[Square], **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "head": case.head,
        "head_modules": [case.head_module],
        "base_name": str(case.base),
        "task_type": "SEQ_CLS",
        "method": case.method,
    }
    write_square(folder, modules, **(arguments | changes))
    return folder


def dense(case: Any, modules: list[Square]) -> nn.Module:
    """The adapted model, each weight added up in float64."""
    model = deepcopy(case.model)
    for update in modules:
        weight = model.get_submodule(update.name).weight
        delta = rotation_delta(update.m.double(), *update.shape)
        weight.data = (weight.double() + (delta.T if update.transposed else delta)).to(weight.dtype)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_applied_and_merged_give_the_logits_of_the_dense_sum(kind: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(kind)
    modules = squares(case)
    expected = case.logits(dense(case, modules))
    assert (expected - case.logits(case.model)).abs().max() > 1e-2  # the update does something
    adapter = write(case, tmp_path / "adapter", modules)
    report = merge(adapter, tmp_path / "out")
    assert report.kind == "MORA"
    assert report.ranks == {m.name: m.rank for m in modules if m.rank}
    torch.testing.assert_close(case.logits(case.load_merged(tmp_path / "out")), expected, rtol=0, atol=1e-5)
    for parameter in case.model.get_submodule(case.head_module).parameters():
        parameter.data.zero_()  # it comes from the file
    apply_adapter(case.model, read_adapter(adapter))
    torch.testing.assert_close(case.logits(case.model), expected, rtol=0, atol=1e-5)


def test_files_read_back_as_they_were(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("gpt2")
    modules = {m.name: m for m in squares(case) if m.rank}
    write(case, tmp_path / "adapter", list(modules.values()), state={"scores": torch.arange(3.0)}, revision="v1")
    adapter = read_adapter(tmp_path / "adapter")
    assert (adapter.kind, adapter.revision, adapter.method["base_model_prefix"]) == ("MORA", "v1", "transformer")
    assert adapter.modules.keys() == modules.keys()
    for name, module in adapter.modules.items():
        assert torch.equal(module.m, modules[name].m)
        assert (module.shape, module.transposed) == (modules[name].shape, True)
    assert {n: t.tolist() for n, t in adapter.head.items()} == {n: t.tolist() for n, t in case.head.items()}
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["kind"]) == ("MORA", "rotation")
    assert {name: entry["side"] for name, entry in config["modules"].items()} == {n: m.rank for n, m in modules.items()}


def test_blocks_of_rows_change_nothing(make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("gpt2")
    write(case, tmp_path / "adapter", squares(case))
    merge(tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr("dora_cli.checkpoints.weights.BLOCK", 37)  # less than a row, or an uneven number of them
    merge(tmp_path / "adapter", tmp_path / "blocks")
    whole, blocks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    assert all(torch.equal(blocks[name], tensor) for name, tensor in whole.items())


def test_bfloat16_weights_are_the_float32_sum_rounded_once(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("llama", dtype=torch.bfloat16)
    modules = squares(case)
    merge(write(case, tmp_path / "adapter", modules), tmp_path / "out")
    before, after = load_file(case.base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    twice = 0
    for module in modules:
        weight, delta = before[f"{module.name}.weight"], rotation_delta(module.m, *module.shape)
        once = (weight.float() + delta).bfloat16()
        assert torch.equal(after[f"{module.name}.weight"], once)
        twice += int((weight + delta.bfloat16() != once).sum())
    assert twice > 0  # rounding ΔW first would have shown


def test_the_command_says_sides_and_parameters(
    make_case: MakeCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = make_case("bert")
    modules = squares(case)
    write(case, tmp_path / "adapter", modules)
    assert dora_merge([f"checkpoint={tmp_path}/adapter", f"out={tmp_path}/out"]) == 0
    n, total = sum(m.rank > 0 for m in modules), sum(m.m.numel() for m in modules)
    assert f"{n} modules, sides 6 to 10, {total} parameters" in capsys.readouterr().out


def test_a_head_alone_is_an_adapter_too(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    merge(write(case, tmp_path / "adapter", []), tmp_path / "out")
    assert torch.equal(case.logits(case.load_merged(tmp_path / "out")), case.logits(case.model))


def test_peft_refuses_it_and_another_adapter_cannot_start_from_it(make_case: MakeCase, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    case = make_case("bert")
    adapter = write(case, tmp_path / "adapter", squares(case))
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(deepcopy(case.model), adapter)
    names = [update.name for update in case.updates]
    layers = inject(case.model, names, Lora(), [2] * len(names))
    with pytest.raises(UserError, match="cannot be the start"):
        start_from(layers, case.model, read_adapter(adapter))


def test_a_base_of_another_shape_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    modules = squares(case)
    modules[-1].shape = (16, 25)
    adapter = write(case, tmp_path / "adapter", modules)
    with pytest.raises(UserError, match="does not fit the base"):
        merge(adapter, tmp_path / "out")
    with pytest.raises(UserError, match="does not fit the base"):
        apply_adapter(case.model, read_adapter(adapter))


NAME = "bert.encoder.layer.0.attention.self.key"
KEY = f"base_model.model.{NAME}.mora_M"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c, t: c.update(kind="sharing"), "kind=sharing is not read"),
        (lambda c, t: c.pop("kind"), "'kind' should be str"),
        (lambda c, t: c.update(modules=[NAME]), "'modules' should be dict"),
        (lambda c, t: c["modules"].pop(NAME), rf"'{NAME}' is in only one"),
        (lambda c, t: t.pop(KEY), rf"'{NAME}' is in only one"),
        (lambda c, t: c["modules"].update({NAME: 6}), rf"'{NAME}' should be dict"),
        (lambda c, t: c["modules"][NAME].update(side="6"), "'side' should be int"),
        (lambda c, t: c["modules"][NAME].update(side=5), "the side 5"),
        (lambda c, t: c["modules"][NAME].update(side=0), "the side 0"),
        (lambda c, t: c["modules"][NAME].update(d_in=0), "the shape 16×0"),
        (lambda c, t: c["modules"][NAME].pop("d_out"), "'d_out' should be int"),
        (lambda c, t: t.update({KEY: torch.ones(6, 8)}), r"has the shape \(6, 8\)"),
        (lambda c, t: t.update({KEY: torch.ones(36)}), r"has the shape \(36,\)"),
        (lambda c, t: t.update({KEY: torch.ones(6, 6).int()}), "has the type I32"),
        (lambda c, t: t.update({"mora_M": torch.ones(6, 6)}), "does not begin with"),
    ],
)
def test_what_does_not_agree_is_refused(edit: Any, message: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    adapter = write(case, tmp_path / "adapter", squares(case))
    config, tensors = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    said, held = json.loads(config.read_text()), load_file(tensors)
    assert said["modules"][NAME] == {"side": 6, "d_out": 16, "d_in": 16}
    edit(said, held)
    config.write_text(json.dumps(said))
    save_file(held, tensors)
    with pytest.raises(UserError) as caught:
        read_adapter(adapter)
    assert pytest.importorskip("re").search(message, f"{caught.value.message} {caught.value.where}")


def test_numbers_that_are_not_finite_are_named_when_read(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    adapter = write(case, tmp_path / "adapter", squares(case))
    held = load_file(adapter / "adapter_model.safetensors")
    held[KEY][0, 0] = float("nan")
    save_file(held, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        read_adapter(adapter).modules[NAME]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_truncated_or_flipped_files_never_end_in_a_traceback(file: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    adapter = write(case, tmp_path / "adapter", squares(case))
    whole = (adapter / file).read_bytes()
    places = torch.randint(0, len(whole), (80,), generator=torch.Generator().manual_seed(0)).tolist()
    refused = 0
    for i, place in enumerate(places):
        damaged = whole[:place] if i % 2 else whole[:place] + bytes([whole[place] ^ (1 << i % 8)]) + whole[place + 1 :]
        (adapter / file).write_bytes(damaged)
        try:
            assert all(module.rank for module in read_adapter(adapter).modules.values())
        except UserError:
            refused += 1
    assert refused >= 40  # every truncation, and what flips show
