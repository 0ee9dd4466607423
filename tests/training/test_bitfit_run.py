"""BitFit through the real command: what moves, resume, and that run, adapter and merged model give the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Train = Callable[..., int]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_biases_and_head_move_all_else_stays_and_merging_is_exact(
    dora_train: Train, tmp_path: Path, model_dir: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    from dora_cli.cli.eval import main as dora_eval
    from dora_cli.cli.merge import main as dora_merge

    assert dora_train("method=bitfit", "train.epochs=4") == 0
    run, merged = tmp_path / "run", tmp_path / "merged"
    summary = read(run / "summary.json")
    assert summary["budget"]["requested"] is None
    assert summary["unit"] == "none"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in metrics if record["split"] == "train"]
    assert losses[-1] < losses[0]

    base = load_file(model_dir / "model.safetensors")
    biases = {f"bert.{name}" for name in base if name.endswith(".bias")}
    assert summary["trained_params"] == sum(base[n.removeprefix("bert.")].numel() for n in biases) + 16 * 2 + 2
    assert summary["trained_params_mean"] == summary["trained_params"]

    assert dora_merge([f"checkpoint={run}", f"out={merged}"]) == 0
    weights = load_file(merged / "model.safetensors")
    saved = load_file(run / "adapter/adapter_model.safetensors")
    saved = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    assert set(saved) == {*biases, "classifier.weight", "classifier.bias"}
    for name, tensor in weights.items():
        expected = saved[name] if name in saved else base[name.removeprefix("bert.")]
        assert torch.equal(tensor, expected), name
        assert (name in saved) == (name.startswith("classifier") or not torch.equal(tensor, base[name[5:]]))
    _, report = AutoModelForSequenceClassification.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

    for checkpoint, extra in ((run, []), (run / "adapter", []), (merged, [f"recipe={run}/config.yaml"])):
        out = tmp_path / f"eval-{checkpoint.name}"
        assert dora_eval([f"checkpoint={checkpoint}", f"out={out}", *extra]) == 0
        record = read(out / "eval-validation.json")
        assert record["metrics"]["loss"] == pytest.approx(summary["metrics"]["validation"]["loss"], abs=1e-5)


def test_a_model_without_biases_is_one_message_and_no_folder(
    dora_train: Train, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    folder = tmp_path / "llama"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaModel(LlamaConfig(vocab_size=32, max_position_embeddings=32, pad_token_id=0, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    assert dora_train("method=bitfit", f"model.name={folder}") == 2
    text = capsys.readouterr().err
    assert "adapter=bitfit trains biases" in text
    assert not (tmp_path / "run").exists()


def test_parts_that_allocate_are_refused(dora_train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert dora_train("method=bitfit", "allocator=prune", "importance=random", "schedule=linear") == 2
    assert "adapter=bitfit" in capsys.readouterr().err
