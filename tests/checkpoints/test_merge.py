"""A merged folder in plain transformers equals the adapted model, whatever the base's names, storage and type."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dora_cli.checkpoints import merge as merge_module
from dora_cli.checkpoints.adapter_format import WeightDecomposed, write_adapter, write_full
from dora_cli.checkpoints.atomic import HOST
from dora_cli.checkpoints.merge import merge
from dora_cli.checkpoints.safetensors_io import DTYPES, read_header

MakeCase = Callable[..., Any]  # tests/checkpoints/conftest.py
KINDS = ["bert", "roberta", "gpt2", "llama"]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_equal_the_adapted_models(kind: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(kind)
    assert {update.rank for update in case.updates} == {0, 1, 2, 3}
    report = merge(case.write(tmp_path / "adapter"), tmp_path / "out")
    assert report.ranks == {u.name: u.rank for u in case.updates if u.rank}
    expected = case.logits(case.dense())
    assert (expected - case.logits(case.model)).abs().max() > 1e-2  # the update does something
    torch.testing.assert_close(case.logits(case.load_merged(tmp_path / "out")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_equals_its_dense_float64_sum(kind: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(kind)
    merge(case.write(tmp_path / "adapter"), tmp_path / "out")
    merged, expected = case.load_merged(tmp_path / "out").state_dict(), case.dense().state_dict()
    assert merged.keys() == expected.keys()
    touched = {f"{u.name}.weight" for u in case.updates if u.rank}
    for name, tensor in expected.items():
        # float32 products of rank 3 with entries below 2: a few units in the last place
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=2e-6 if name in touched else 0)


def test_bfloat16_weights_are_the_float32_sum_rounded_once(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("llama", dtype=torch.bfloat16)
    merge(case.write(tmp_path / "adapter"), tmp_path / "out")
    before, after = load_file(case.base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    twice = 0
    for update in case.updates:
        weight = before[f"{update.name}.weight"]
        once = (weight.float() + update.b @ update.a).bfloat16()
        assert torch.equal(after[f"{update.name}.weight"], once)
        twice += int((weight + (update.b @ update.a).bfloat16() != once).sum())
    assert twice > 0  # rounding ΔW first would have shown


def test_an_explicit_type_rounds_the_float32_sum_once_too(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    merge(case.write(tmp_path / "adapter"), tmp_path / "out", dtype="float16")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {torch.float16}
    for update in case.updates:
        weight = case.model.get_submodule(update.name).weight
        assert torch.equal(after[f"{update.name}.weight"], (weight + update.b @ update.a).half())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_a_sharded_base_merges_into_shards_with_true_totals(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("llama", max_shard_size="8KB")
    assert len(list(case.base.glob("*.safetensors"))) > 2
    report = merge(case.write(tmp_path / "adapter"), tmp_path / "out", shard_size="6KB")
    torch.testing.assert_close(
        case.logits(case.load_merged(tmp_path / "out")), case.logits(case.dense()), rtol=0, atol=1e-5
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in (tmp_path / "out").glob("*.safetensors")}
    assert report.shards == len(files) > 2
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    sizes = {file: sum(t.nbytes for t in tensors.values()) for file, tensors in files.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) == report.bytes
    assert all(size <= 6000 or len(files[file]) == 1 for file, size in sizes.items())


def test_tensors_of_mixed_types_lie_aligned_to_their_type(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert", dtype=torch.bfloat16)
    tensors = load_file(case.base / "model.safetensors") | {"odd": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, case.base / "model.safetensors", {"format": "pt"})
    case.write(tmp_path / "adapter", head={name: tensor.float() for name, tensor in case.head.items()})
    merge(tmp_path / "adapter", tmp_path / "out")
    entries = read_header(tmp_path / "out" / "model.safetensors")
    assert {entry.dtype for entry in entries.values()} == {"BF16", "F32"}  # heads stay as trained
    assert all(entry.start % DTYPES[entry.dtype].itemsize == 0 for entry in entries.values())


def test_blocks_of_rows_change_nothing(make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("gpt2")
    merge(case.write(tmp_path / "adapter"), tmp_path / "whole")
    monkeypatch.setattr("dora_cli.checkpoints.weights.BLOCK", 37)  # less than a row, or an uneven number of them
    merge(tmp_path / "adapter", tmp_path / "blocks")
    whole, blocks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    for name, tensor in whole.items():
        torch.testing.assert_close(blocks[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1 << 18, 37])
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_decomposed_rows_get_the_magnitude_as_norm(
    transposed: bool, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dora_cli.checkpoints.weights.BLOCK", block)
    torch.manual_seed(0)
    weight, a, b = torch.randn(7, 12), torch.randn(2, 12), torch.randn(7, 2)
    weight[3], b[3] = 0, 0  # a row without a direction
    magnitude = torch.rand(7) + 0.5
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"layer.weight": (weight.T if transposed else weight).contiguous()}, base / "model.safetensors")
    module = WeightDecomposed("layer", a, b, transposed, magnitude=magnitude)
    options: dict[str, Any] = {"head": {}, "head_modules": [], "task_type": None, "method": {}}
    write_adapter(tmp_path / "adapter", modules=[module], base_name=str(base), **options)
    merge(tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["layer.weight"]
    merged = merged.T if transposed else merged
    new = weight.double() + b.double() @ a.double()
    expected = magnitude[:, None] * new / new.norm(dim=1, keepdim=True)
    expected[3] = 0
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=1e-6)


def test_whole_parameters_take_the_place_of_the_bases(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    trained = {n: p.detach() + torch.randn_like(p) / 10 for n, p in case.model.named_parameters()}
    write_full(
        tmp_path / "adapter",
        trained,
        head_modules=[case.head_module],
        base_name=str(case.base),
        task_type="SEQ_CLS",
        method=case.method,
    )
    merge(tmp_path / "adapter", tmp_path / "out")
    merged = dict(case.load_merged(tmp_path / "out").named_parameters())
    assert merged.keys() == trained.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in trained.items())


def test_a_head_alone_merges_into_a_base_with_bare_names(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    write_full(
        tmp_path / "adapter",
        case.head,
        head_modules=[case.head_module],
        base_name=str(case.base),
        task_type="SEQ_CLS",
        method=case.method,
    )
    merge(tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(case.logits(case.load_merged(tmp_path / "out")), case.logits(case.model))


def test_a_head_of_another_size_replaces_the_bases(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert", saved="BertForSequenceClassification")
    head = {"classifier.weight": torch.randn(5, 16), "classifier.bias": torch.randn(5)}
    labels = {i: f"kind {i}" for i in range(5)}
    method = case.method
    method["model_config"] |= {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    merge(case.write(tmp_path / "adapter", head=head, method=method), tmp_path / "out")
    model = case.load_merged(tmp_path / "out")
    assert torch.equal(model.classifier.weight, head["classifier.weight"])
    assert model.config.id2label == labels


def test_labels_of_another_task_do_not_stay_behind(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    config = json.loads((case.base / "config.json").read_text())
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (case.base / "config.json").write_text(json.dumps(config | labels | {"problem_type": "regression"}))
    method = case.method
    for key in ("id2label", "label2id", "problem_type"):  # the defaults: two labels, as transformers leaves them out
        method["model_config"].pop(key, None)
    head = {"classifier.weight": torch.randn(2, 16), "classifier.bias": torch.randn(2)}
    merge(case.write(tmp_path / "adapter", head=head, method=method), tmp_path / "out")
    merged = case.load_merged(tmp_path / "out").config
    assert merged.id2label == {0: "LABEL_0", 1: "LABEL_1"} and merged.problem_type is None


def test_the_pretraining_head_is_left_out_and_named(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("roberta")
    report = merge(case.write(tmp_path / "adapter"), tmp_path / "out")
    assert report.left_out and all(name.startswith("lm_head.") for name in report.left_out)


def test_a_causal_model_keeps_its_tied_embedding(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("gpt2")
    case.write(tmp_path / "adapter", head={}, head_modules=[], task_type="CAUSAL_LM", method={})
    merge(tmp_path / "adapter", tmp_path / "out")
    base = transformers.GPT2LMHeadModel.from_pretrained(case.base)
    merged, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.lm_head.weight is merged.transformer.wte.weight
    for update in case.updates:
        weight = base.get_submodule(update.name).weight.data
        weight += (update.b @ update.a).T if update.transposed else update.b @ update.a
    torch.testing.assert_close(case.logits(merged), case.logits(base), rtol=0, atol=1e-5)


def test_a_tied_embedding_that_was_trained_in_full_is_still_both(make_case: MakeCase, tmp_path: Path) -> None:
    case, trained = make_case("gpt2"), torch.randn(60, 16)
    options: dict[str, Any] = {"head_modules": [], "base_name": str(case.base), "task_type": "CAUSAL_LM"}
    method = {"base_model_prefix": "transformer", "architecture": "GPT2LMHeadModel"}
    write_full(tmp_path / "adapter", {"transformer.wte.weight": trained}, method=method, **options)
    merge(tmp_path / "adapter", tmp_path / "out")
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.transformer.wte.weight and torch.equal(merged.lm_head.weight, trained)


@pytest.mark.usefixtures("unlisted")
def test_square_conv1d_weights_follow_the_others_of_their_kind(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("gpt2")
    assert any(u.a.shape[1] == u.b.shape[0] and u.rank for u in case.updates)
    case.write(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["fan_in_fan_out"] = False  # PEFT leaves there what the last adapted layer was
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merge(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(
        case.logits(case.load_merged(tmp_path / "out")), case.logits(case.dense()), rtol=0, atol=1e-5
    )


def test_small_files_come_along_and_the_adapters_tokenizer_wins(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("llama")
    (case.base / "special_tokens_map.json").write_text("{}")
    (case.base / "pytorch_model.bin").write_text("not to be copied")
    adapter = case.write(tmp_path / "adapter")
    (adapter / "tokenizer_config.json").write_text('{"pad_token": "<p>"}')
    merge(adapter, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer_config.json",
    ]
    assert "<p>" in (tmp_path / "out" / "tokenizer_config.json").read_text()


# what the user can get wrong


def test_a_failure_in_the_middle_leaves_nothing(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_case("bert").write(tmp_path / "adapter")
    written = []

    def write_some(*place: Any) -> None:
        written.append(place)
        if len(written) > 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module, "write_piece", write_some)
    torch.set_num_threads(threads := 2)
    with pytest.raises(OSError, match="No space left"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
    assert torch.get_num_threads() == threads


def test_a_full_disk_is_noticed_before_writing(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_case("bert").write(tmp_path / "adapter")
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="are free"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_killed_merge_left_makes_room_for_the_next(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_case("bert").write(tmp_path / "adapter")
    leftover = tmp_path / f".out.tmp-{HOST}-{os.getpid()}-00000000-0"  # of a process that had this number before
    leftover.mkdir()
    real = shutil.disk_usage
    full = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: full if leftover.exists() else real(path))
    merge(tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not leftover.exists()


def test_a_killed_merge_leaves_nothing_that_looks_finished(make_case: MakeCase, tmp_path: Path) -> None:
    make_case("bert").write(tmp_path / "adapter")
    script = (
        "import sys, time; from dora_cli.checkpoints import merge as m; done = m.write_piece\n"
        "m.write_piece = lambda *place: (done(*place), time.sleep(0.2))\n"
        "m.merge(sys.argv[1], sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "adapter"), str(tmp_path / "out")])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.tmp-*/model.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    leftover = next(tmp_path.glob(".out.tmp-*"))
    assert not (leftover / "config.json").exists()
    merge(tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
