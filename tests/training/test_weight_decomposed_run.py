"""Through the real command: weight-decomposed, static and pruned, and the two presets beside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dora_cli.adapters.inject import inject
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.weight_decomposed import WeightDecomposed
from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.apply import apply_adapter, start_from
from dora_cli.errors import UserError

peft = pytest.importorskip("peft")

Train = Callable[..., int]
STATIC = ["method=weight_decomposed", "budget=r0.6"]  # 7 of 12 modules, one component each
PRUNED = ["method=weight_decomposed", "importance=component_norm", "allocator=prune", "schedule=cubic_late"]
PRUNED += ["budget=r0.6", "adapter.rank=2"]  # from 24 components to 7
FRESH = {"num_labels": 2, "pad_token_id": 0, "dtype": torch.float32}


@pytest.fixture(params=["bert", "gpt2"])
def base(request: pytest.FixtureRequest, model_dir: Path, tmp_path: Path) -> Path:
    """The tiny BERT, and a GPT-2 whose layers keep their weights transposed, in 8 modules."""
    if request.param == "bert":
        return model_dir
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=24, n_positions=40, n_embd=16, n_layer=3, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def bare(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, **FRESH).eval()


def logits(model: Any) -> Tensor:
    ids = torch.randint(4, 24, (6, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(6, 11, dtype=torch.long)
    mask[3:, 8:] = 0
    with torch.no_grad():
        return model.eval()(input_ids=ids * mask, attention_mask=mask).logits  # type: ignore[no-any-return]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("words", [STATIC, PRUNED, [*PRUNED, "export=uniform"]], ids=["static", "pruned", "uniform"])
def test_peft_and_the_merged_model_give_the_same_logits(
    words: list[str], base: Path, dora_train: Train, tmp_path: Path
) -> None:
    assert dora_train(f"model.name={base}", *words, "train.epochs=3", "save.merged=true", "adapter.dropout=0.1") == 0
    run = tmp_path / "run"
    summary, config = read(run / "summary.json"), read(run / "adapter/adapter_config.json")
    ranks = summary["ranks"]
    kept = round(0.6 * len(ranks))
    assert summary["budget"]["components_end"] == kept == sum(ranks.values())
    assert config["use_dora"]
    # A module without a component keeps its magnitude, unless it never had one.
    wanted = [name for name, rank in ranks.items() if rank] if words is STATIC else list(ranks)
    assert sorted(config["target_modules"]) == sorted(wanted)
    assert 0 in ranks.values()

    ours = bare(base)
    untrained = logits(ours)
    apply_adapter(ours, read_adapter(run))
    reference = logits(ours)
    merged = AutoModelForSequenceClassification.from_pretrained(run / "merged", dtype=torch.float32)
    assert not torch.allclose(reference, untrained, atol=1e-3), "the adapter changes nothing: a test of nothing"
    assert torch.allclose(reference, logits(peft.PeftModel.from_pretrained(bare(base), run / "adapter")), atol=1e-5)
    assert torch.allclose(reference, logits(merged), atol=1e-5)


def test_an_emptied_module_keeps_a_trained_magnitude(dora_train: Train, tmp_path: Path, model_dir: Path) -> None:
    assert dora_train(*PRUNED, "train.epochs=3") == 0
    ranks = read(tmp_path / "run/summary.json")["ranks"]
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    emptied = [name for name, rank in ranks.items() if rank == 0]
    model = bare(model_dir)
    for name in emptied:
        stem = f"base_model.model.{name}."
        assert tensors[stem + "lora_A.weight"].shape[0] == 1
        assert not bool(tensors[stem + "lora_B.weight"].any())
        before = model.get_submodule(name).weight.norm(dim=1)
        assert not torch.allclose(tensors[stem + "lora_magnitude_vector"], before, rtol=1e-4)


def test_eval_of_run_adapter_and_merged_gives_the_runs_numbers(dora_train: Train, tmp_path: Path) -> None:
    from dora_cli.cli.eval import main as dora_eval
    from dora_cli.cli.merge import main as dora_merge

    assert dora_train(*PRUNED, "train.epochs=3") == 0
    run, merged = tmp_path / "run", tmp_path / "merged"
    expected = read(run / "summary.json")["metrics"]["validation"]
    assert dora_merge([f"checkpoint={run}", f"out={merged}"]) == 0
    for checkpoint, extra in ((run, []), (run / "adapter", []), (merged, [f"recipe={run}/config.yaml"])):
        out = tmp_path / f"eval-{checkpoint.name}"
        assert dora_eval([f"checkpoint={checkpoint}", f"out={out}", *extra]) == 0
        found = read(out / "eval-validation.json")["metrics"]
        assert found["accuracy"] == expected["accuracy"]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("step", [7, 14])
@pytest.mark.parametrize(
    "words",
    [[*PRUNED, "adapter.dropout=0.1"], ["method=adalora_official", "budget=r2", "adapter.rank=4"]],
    ids=["pruned", "adalora_official"],
)
def test_resuming_gives_the_same_bits(
    words: list[str], step: int, dora_train: Train, tmp_path: Path, unplugged: Callable[..., None]
) -> None:
    """The window is steps 3 to 10 here: before the final choice and after it."""

    words = [*words, "allocator.interval=3", "train.max_steps=20", "train.save_every=7", "train.eval_every=20"]
    words += ["schedule.start=3", "schedule.end=10"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(step, *words, f"out={tmp_path}/cut")
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    for name in ("adapter/adapter_model.safetensors", "adapter/method_state.safetensors"):
        whole, cut = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert whole.keys() == cut.keys()
        for key, tensor in whole.items():
            assert torch.equal(tensor, cut[key]), key
    events = read(tmp_path / "whole/ranks.json")
    assert events == read(tmp_path / "cut/ranks.json")
    assert len(events) >= 3


@pytest.mark.parametrize("source", ["lora", "weight_decomposed", "peft"])
def test_a_run_starts_from_a_plain_pair_and_from_its_own_kind(
    source: str, dora_train: Train, tmp_path: Path, model_dir: Path
) -> None:
    folder = tmp_path / "run"
    if source == "peft":  # with a scale, and magnitudes away from the norms
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=6, use_dora=True, target_modules=["query"])
        model = peft.get_peft_model(bare(model_dir), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.rand_like(parameter) * 0.3)
        model.save_pretrained(folder)
    else:
        assert dora_train(f"method={source}", "budget=r2", "train.max_steps=20") == 0
    adapter = read_adapter(folder)
    expected, model = bare(model_dir), bare(model_dir)
    apply_adapter(expected, adapter)
    layers = inject(model, list(adapter.modules), WeightDecomposed(alpha=8.0), [3] * len(adapter.modules))
    assert start_from(layers, model, adapter) == len(adapter.modules)
    assert not torch.allclose(logits(expected), logits(bare(model_dir)), atol=1e-3)
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)

    plain = bare(model_dir)
    layers = inject(plain, list(adapter.modules), Lora(), [3] * len(adapter.modules))
    if source == "lora":
        assert start_from(layers, plain, adapter) == len(adapter.modules)
    else:
        with pytest.raises(UserError, match="cannot be the start"):
            start_from(layers, plain, adapter)


def test_the_command_starts_from_another_runs_adapter(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("method=weight_decomposed", "budget=r2", "train.epochs=2", f"out={tmp_path}/first") == 0
    reached = read(tmp_path / "first/summary.json")["last"]["value"]
    start = f"adapter.init_from={tmp_path}/first"
    short = ["budget=r2", "train.max_steps=1", "train.learning_rate=1e-6"]
    assert dora_train("method=weight_decomposed", start, *short) == 0
    assert read(tmp_path / "run/summary.json")["last"]["value"] == reached
    assert dora_train("method=lora", start, *short, f"out={tmp_path}/refused") == 2
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_low_precision_recomputation_and_accumulation_train(dora_train: Train, tmp_path: Path) -> None:
    words = ["train.precision=bf16", "train.gradient_checkpointing=true", "train.accumulation=2", "adapter.dropout=0.1"]
    assert (
        dora_train("method=weight_decomposed", "budget=r2", "train.max_steps=60", "train.learning_rate=0.05", *words)
        == 0
    )
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["split"] == "train"]
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("method", ["rslora", "adalora_official"])
def test_the_other_presets_export_what_they_trained(
    method: str, dora_train: Train, tmp_path: Path, model_dir: Path
) -> None:
    words = ["adapter.rank=4"] if method == "adalora_official" else []
    assert dora_train(f"method={method}", "budget=r2", *words, "train.epochs=3", "save.merged=true") == 0
    run = tmp_path / "run"
    summary, state = read(run / "summary.json"), load_file(run / "adapter/method_state.safetensors")
    assert summary["budget"]["components_end"] == 24
    if method == "adalora_official":
        assert summary["budget"]["components_start"] == 48
        assert len(set(summary["ranks"].values())) > 1
        assert torch.equal(state["gate"] != 0, state["alive"])
    ours = bare(model_dir)
    untrained = logits(ours)
    apply_adapter(ours, read_adapter(run))
    reference = logits(ours)
    assert not torch.allclose(reference, untrained, atol=1e-3)
    assert torch.allclose(
        reference, logits(peft.PeftModel.from_pretrained(bare(model_dir), run / "adapter")), atol=1e-5
    )
    merged = AutoModelForSequenceClassification.from_pretrained(run / "merged", dtype=torch.float32)
    assert torch.allclose(reference, logits(merged), atol=1e-5)
