"""``dora-compress`` from the outside: its adapters load everywhere, all else in them is as it was, errors are true."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.adapter_format import (
    LowRank,
    Square,
    TokenRows,
    WeightDecomposed,
    write_adapter,
    write_full,
    write_square,
)
from dora_cli.checkpoints.merge import merge
from dora_cli.cli.compress import main

MakeCase = Callable[..., Any]  # tests/checkpoints/conftest.py
CLOSE = {"rtol": 0, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers warn about themselves


def in_peft(case: Any, adapter: Path) -> torch.Tensor:
    return case.logits(peft.PeftModel.from_pretrained(deepcopy(case.model), adapter))


def compressed(*words: str) -> None:
    assert main(list(words)) == 0


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compress.json").read_text())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_compressed_run_is_the_model_of_the_cut_updates_everywhere(
    kind: str, make_case: MakeCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = make_case(kind)
    about = {**case.method, "metrics": {"validation": {"accuracy": 1}}, "ranks": {u.name: u.rank for u in case.updates}}
    case.write(tmp_path / "run" / "adapter", method=about)
    (tmp_path / "run" / "config.yaml").write_text("recipe: some\n")
    out = tmp_path / "a=b:c"
    compressed(f"checkpoint={tmp_path / 'run'}", "budget=r0.6", f"out={out}")
    text = capsys.readouterr().out
    kept = round(0.6 * len(case.updates))  # modules of rank 0 count in an average
    assert f"{sum(u.rank for u in case.updates)} → {kept}" in text and "emptied" in text
    assert f"recipe={tmp_path / 'run' / 'config.yaml'}" in text
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80

    # the same by a full decomposition of every ΔW: the largest of all, wherever they are
    parts = {u.name: torch.linalg.svd(u.b.double() @ u.a.double(), full_matrices=False) for u in case.updates}
    least = torch.cat([values for _, values, _ in parts.values()]).sort(descending=True).values[kept - 1]
    ranks = {name: int((values >= least).sum()) for name, (_, values, _) in parts.items()}
    assert sum(ranks.values()) == kept
    lost = total = 0.0
    for update in case.updates:
        left, values, right = parts[update.name]
        rank = ranks[update.name]
        update.a, update.b = right[:rank].float(), (left[:, :rank] * values[:rank]).float()
        lost, total = lost + float(values[rank:].square().sum()), total + float(values.square().sum())
    expected = case.logits(case.dense())

    record = record_of(out)
    assert record["after"]["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert {name: module["after"] for name, module in record["modules"].items()} == {
        update.name: ranks[update.name] for update in case.updates if update.name in record["modules"]
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == [name for name, rank in ranks.items() if rank]
    again = read_adapter(out)
    assert all(torch.equal(again.head[name], tensor) for name, tensor in case.head.items())
    assert again.method["ranks"] == ranks and "metrics" not in again.method
    for parameter in case.model.get_submodule(case.head_module).parameters():
        parameter.data.zero_()  # it comes from the file
    torch.testing.assert_close(in_peft(case, out), expected, **CLOSE)
    merge(out, tmp_path / "merged")
    torch.testing.assert_close(case.logits(case.load_merged(tmp_path / "merged")), expected, **CLOSE)

    compressed(f"checkpoint={out}", "energy=1", f"out={tmp_path / 'twice'}")
    assert record_of(tmp_path / "twice")["after"]["error"] == 0
    torch.testing.assert_close(in_peft(case, tmp_path / "twice"), expected, **CLOSE)


def test_a_file_of_one_rank_stays_below_its_budget(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("llama")
    for update in case.updates:
        d_out, d_in = update.shape
        update.a, update.b = torch.randn(4, d_in), torch.randn(d_out, 4)
    case.write(tmp_path / "adapter")
    compressed(f"checkpoint={tmp_path / 'adapter'}", "budget=0.6", "export=uniform", f"out={tmp_path / 'out'}")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    factors = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    assert {tensor.shape[0] for name, tensor in factors.items() if "lora_A" in name} == {2}
    record = record_of(tmp_path / "out")
    written = sum(tensor.numel() for tensor in factors.values())
    assert written == record["after"]["parameters"] <= 0.6 * record["before"]["parameters"]


def test_the_commands_that_it_ends_with_name_what_there_is(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe of somebody's own is known by its name alone, of which nothing can be made elsewhere."""
    case = make_case("bert")
    for noted, said in (("quickstart", "quickstart"), ("mine", "NAME")):
        adapter, out = case.write(tmp_path / noted, method={**case.method, "recipe": noted}), tmp_path / f"less {noted}"
        compressed(f"checkpoint={adapter}", "energy=1", f"out={out}")
        commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[-2:]]
        assert commands[0] == ["dora-eval", f"checkpoint={out}", f"recipe={said}"]
        assert commands[1] == ["dora-merge", f"checkpoint={out}", f"out={out}-merged"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main([f"checkpoint={adapter}", "energy=1", "out=."]) == 2
    assert "is the folder that you are in" in capsys.readouterr().err and not os.listdir()


@pytest.mark.parametrize("variant", ["rslora_bias", "adalora", "use_dora"])
def test_pefts_own_adapters_stay_the_same_model(variant: str, make_case: MakeCase, tmp_path: Path) -> None:
    """At full energy, with all that was trained beside the factors."""
    case = make_case("bert")
    common: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query", "output.dense"]}
    if variant == "adalora":
        config: Any = peft.AdaLoraConfig(init_r=4, total_step=10, **common)
    elif variant == "use_dora":
        config = peft.LoraConfig(r=3, use_dora=True, **common)
    else:
        config = peft.LoraConfig(r=4, use_rslora=True, bias="all", **common)
    model = peft.get_peft_model(deepcopy(case.model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, parameter in model.named_parameters():  # a component that is another one's double
            if "lora_A" in name or "lora_B" in name:
                second = parameter if "lora_A" in name else parameter.T
                second[1] = second[0]
            if "layer.1" in name and "lora_B" in name:
                parameter.zero_()  # a module without an update is left out, its bias is not
    expected = case.logits(model)
    model.save_pretrained(tmp_path / "peft")
    compressed(f"checkpoint={tmp_path / 'peft'}", "energy=1", f"out={tmp_path / 'out'}")
    totals = record_of(tmp_path / "out")
    assert totals["after"]["components"] < totals["before"]["components"]
    torch.testing.assert_close(in_peft(case, tmp_path / "out"), expected, **CLOSE)
    assert read_adapter(tmp_path / "out").kind == "LORA"


def test_new_tokens_their_tokenizer_and_magnitudes_stay(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    rows = torch.randn(2, 16)
    modules = [WeightDecomposed(u.name, u.a, u.b, magnitude=torch.rand(u.shape[0]) + 0.5) for u in case.updates]

    def tokenizer(folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"new": "words"}')

    words = TokenRows("bert.embeddings.word_embeddings", [3, 61], rows)
    case.write(tmp_path / "adapter", modules=modules, tokens=[words], beside=tokenizer)
    compressed(f"checkpoint={tmp_path / 'adapter'}", "budget=0.3", f"out={tmp_path / 'out'}")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()  # an emptied module keeps its magnitude, and a component of zeros
    same = [name for name in before if "lora_A" not in name and "lora_B" not in name]
    assert len(same) > 10 and all(torch.equal(before[name], after[name]) for name in same)
    settings = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("adapter", "out")]
    assert settings[0]["trainable_token_indices"] == settings[1]["trainable_token_indices"]
    assert settings[1]["use_dora"] and (tmp_path / "out" / "tokenizer.json").read_text() == '{"new": "words"}'
    assert read_adapter(tmp_path / "out").tokens["bert.embeddings.word_embeddings"].ids == [3, 61]


def test_a_dry_run_writes_nothing_and_says_what_the_run_does(
    make_case: MakeCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = make_case("bert")
    adapter = case.write(tmp_path / "adapter")
    compressed(f"checkpoint={adapter}", "dry_run=json", "budget=0.5")
    planned = json.loads(capsys.readouterr().out)
    compressed(f"checkpoint={adapter}", "dry_run=true", f"out={tmp_path / 'out'}")
    text = capsys.readouterr().out
    assert "written: " in text and "kept of Σσ²" in text and max(map(len, text.splitlines()[2:])) <= 80
    assert not (tmp_path / "out").exists()
    compressed(f"checkpoint={adapter}", "budget=0.5", f"out={tmp_path / 'out'}")
    curve = planned.pop("curve")
    assert record_of(tmp_path / "out") == planned
    assert [row["share"] for row in curve] == [0.75, 0.5, 0.25, 0.1] and curve[1].items() >= planned["after"].items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "checkpoint= is missing"),
        (["checkpoint=a", "budget=0.5"], "out= is missing"),
        (["checkpoint=a", "out=y"], "budget= or energy= is missing"),
        (["checkpoint=a", "out=y", "budget=0.5", "energy=0.9"], "both say what is to be left"),
        (["chekpoint=a", "out=y"], "did you mean 'checkpoint'"),
        (["checkpoint=a", "out=y", "budget=50%"], "say budget=0.5"),
        (["checkpoint=a", "out=y", "energy=0"], "energy=0 is no share in (0, 1]"),
        (["checkpoint=a", "out=y", "energy=nan"], "energy=nan is no share in (0, 1]"),
        (["checkpoint=a", "out=y", "budget=0.5", "rank_by=size"], "unknown rank_by 'size'"),
        (["checkpoint=a", "out=y", "budget=0.5", "dry_run=maybe"], "unknown dry_run 'maybe'"),
        (["checkpoint=a", "out=y", "budget=0.5", "rank_by=energy", "export=uniform"], "no meaning with export=uniform"),
        (["checkpoint=a", "out=y", "budget=r50"], "asks for more than the adapter has"),
        (["checkpoint=a", "out=y", "budget=20"], "keeps no component at all"),
        (["checkpoint=a", "out=full", "budget=0.5"], "out=full exists and is not empty"),
        (["checkpoint=a", "out=a/manifest.json/x", "budget=0.5"], "manifest.json is a file"),
        (["checkpoint=a", "out=a/manifest.json/x/y", "budget=0.5"], "manifest.json is a file"),
        (["checkpoint=nowhere", "out=y", "budget=0.5"], "there is no folder nowhere"),
        (["checkpoint=full", "out=y", "budget=0.5"], "holds whole parameters and no low-rank update"),
        (["checkpoint=square", "out=y", "budget=0.5"], "holds square updates, which have no components"),
        (["checkpoint=new", "out=y", "budget=0.5"], "changes nothing: every module's update is 0"),
        (["checkpoint=odd", "out=y", "budget=0.5"], "method.json is damaged"),
        (["checkpoint=broken", "out=y", "budget=0.5"], "holds numbers that are not finite"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    about: dict[str, Any] = {"head_modules": [], "base_name": "b", "task_type": None, "method": {}}
    update = LowRank("m", torch.randn(2, 16), torch.randn(16, 2))
    write_adapter("a", modules=[update], head={}, **about)
    write_adapter("new", modules=[LowRank("m", update.a, update.b * 0)], head={}, **about)
    write_adapter("odd", modules=[update], head={}, **about | {"method": {"recipe": ["x"]}})
    write_full("full", {"m.bias": torch.ones(3)}, **about)
    write_square("square", [Square("m", torch.randn(4, 4), (16, 16))], head={}, **about)
    write_adapter("broken", modules=[update], head={}, **about)
    (tmp_path / "broken" / "manifest.json").unlink()
    weights = load_file("broken/adapter_model.safetensors")
    weights["base_model.model.m.lora_A.weight"][0, 0] = torch.inf
    save_file(weights, "broken/adapter_model.safetensors")
    there = sorted(os.listdir())
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and "Traceback" not in errors
    assert sorted(os.listdir()) == there


def test_help_and_mistakes_answer_without_torch() -> None:
    script = (
        "import sys; from dora_cli.cli.compress import main; main(['--help']); main(['checkpoint=x', 'budget=x'])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "usage: dora-compress checkpoint=RUN_OR_ADAPTER" in done.stdout
