"""Runs on packed bases, through the real command: pruned, exported, evaluated, merged both ways, and resumed."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.apply import apply_adapter
from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge
from dora_cli.config.schema import ModelConfig
from dora_cli.models.load import load_model
from dora_cli.models.quantised import KINDS

Train = Callable[..., int]
Unplug = Callable[[int], AbstractContextManager[None]]

NF4 = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
AO = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is missing")
KIND = [pytest.param(kind, marks=AO if kind == "ao_int8" else NF4) for kind in KINDS]
ONE = [KIND[0], *(pytest.param(*other.values, marks=[*other.marks, pytest.mark.slow]) for other in KIND[1:])]
PRUNED = ["method=dora", "budget=r1", "adapter.rank=3", "train.epochs=3", "save.which=last"]
IDS = torch.tensor([[2, 5, 12, 9, 3], [2, 14, 16, 3, 0], [2, 21, 7, 8, 3]])

pytestmark = pytest.mark.filterwarnings("ignore")  # what the packages say of their own future


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=(IDS > 0).long()).logits  # type: ignore[no-any-return]


def packed(folder: Path, kind: str | None) -> Any:
    config = ModelConfig(str(folder), quantization=kind)
    return load_model(config, auto_class="AutoModelForSequenceClassification", offline=True, num_labels=2).model


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.fixture
def shaken(tiny_models: Any, model_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A base on which rounding shows, with the tokenizer of the data."""
    from transformers import AutoTokenizer

    def make(architecture: str) -> Path:
        folder = tiny_models.save_shaken(tmp_path / "base", architecture, "AutoModel", tiny_models.ENCODER_TOKENS)
        AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
        return Path(folder)

    return make


@pytest.mark.parametrize("kind", KIND)
def test_a_run_is_evaluated_merged_and_read_by_peft_as_it_was_trained(
    kind: str,
    dora_train: Train,
    tmp_path: Path,
    shaken: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    peft = pytest.importorskip("peft")
    run, merged, base = tmp_path / "run", tmp_path / "dequantised", shaken("bert")
    assert dora_train(*PRUNED, f"model.name={base}", f"model.quantization={kind}", "save.merged=true") == 0
    assert "with the original weights" in capsys.readouterr().out
    assert read(run / "adapter/method.json")["quantization"]["kind"] == kind

    ours = packed(base, kind)
    apply_adapter(ours, read_adapter(run))
    reference = logits(ours)
    theirs = peft.PeftModel.from_pretrained(packed(base, kind), run / "adapter")
    assert torch.allclose(logits(theirs), reference, atol=1e-5)

    assert dora_merge([f"checkpoint={run}", f"out={merged}", "base_weights=dequantised"]) == 0
    assert f"the {kind} weights" in capsys.readouterr().out
    assert read(merged / "merge.json")["base_weights"] == "dequantised"
    # LLM.int8() rounds what goes into each layer in evaluation, a merged model does not
    close = 2e-2 if kind == "bnb_int8" else 1e-5
    assert torch.allclose(logits(loaded(merged)), reference, atol=close)
    error = (logits(loaded(run / "merged")) - reference).abs().max()
    assert 0 < error < 0.2  # trained on rounded weights, put on those that are not

    told = read(run / "summary.json")["metrics"]["validation"]["loss"]
    for checkpoint, words, expected in (
        (run, [], told),
        (merged, [f"recipe={run}/config.yaml"], told),
        (run, ["model.quantization=null"], None),
    ):
        out = tmp_path / "eval"
        assert dora_eval([f"checkpoint={checkpoint}", f"out={out}", *words]) == 0
        found = read(out / "eval-validation.json")["metrics"]["loss"]
        if expected is None:
            assert found != pytest.approx(told, abs=1e-6)
        else:
            assert found == pytest.approx(expected, abs=close)


@NF4
@pytest.mark.parametrize("method", ["weight_decomposed", "lora"])
def test_transposed_and_weight_decomposed_layers_merge_as_trained(
    method: str, dora_train: Train, tmp_path: Path, shaken: Callable[[str], Path]
) -> None:
    base = shaken("gpt2")
    words = ["budget=r1", "train.epochs=1", "model.quantization=bnb_nf4", "adapter.targets=[attn.c_proj]"]
    assert dora_train(f"model.name={base}", f"method={method}", *words) == 0
    ours = packed(base, "bnb_nf4")
    apply_adapter(ours, read_adapter(tmp_path / "run"))
    for checkpoint in ("original", "dequantised"):
        out = tmp_path / checkpoint
        assert dora_merge([f"checkpoint={tmp_path / 'run'}", f"out={out}", f"base_weights={checkpoint}"]) == 0
    assert torch.allclose(logits(loaded(tmp_path / "dequantised")), logits(ours), atol=1e-5)
    plain = packed(base, None)
    apply_adapter(plain, read_adapter(tmp_path / "run"))  # the square targets are stored transposed, and it knows
    assert torch.allclose(logits(loaded(tmp_path / "original")), logits(plain), atol=1e-5)


@pytest.mark.parametrize("kind", ONE)
def test_resuming_gives_the_same_bits(kind: str, dora_train: Train, tmp_path: Path, unplugged_at: Unplug) -> None:
    words = [*PRUNED, f"model.quantization={kind}", "train.save_every=7", "adapter.dropout=0.1"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    with unplugged_at(14):
        dora_train(*words, f"out={tmp_path}/cut")
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    whole, cut = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


@NF4
def test_a_base_that_is_stored_packed_is_trained_on_as_it_is(
    dora_train: Train, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

    base = tmp_path / "stored"
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["pooler.dense", "classifier"]
    )
    AutoModel.from_pretrained(model_dir, quantization_config=how).save_pretrained(base)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(base)
    words = [f"model.name={base}", "method=lora", "budget=r1", "train.epochs=1"]

    def refused(*more: str) -> str:
        assert dora_train(*words, *more) == 2
        assert not (tmp_path / "run").exists()
        return " ".join(capsys.readouterr().err.split())

    assert "are stored quantised already" in refused("model.quantization=bnb_nf4")
    assert "adapter=full does not go with a quantised base" in refused("method=full", "budget=null")
    assert "nothing can be added to the quantised weights" in refused("save.merged=true")
    assert dora_train(*words) == 0
    assert read(tmp_path / "run/adapter/method.json")["quantization"]["kind"] == "stored"
    told = read(tmp_path / "run/summary.json")["metrics"]["validation"]["loss"]
    assert dora_eval([f"checkpoint={tmp_path / 'run'}"]) == 0
    assert read(tmp_path / "run/eval-validation.json")["metrics"]["loss"] == pytest.approx(told, abs=1e-6)
    for onto in ("original", "dequantised"):
        assert dora_merge([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / onto}", f"base_weights={onto}"]) == 2
        assert "quantised" in capsys.readouterr().err
    assert dora_merge([f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}", f"base={model_dir}"]) == 0


@pytest.mark.parametrize("kind", ONE)
def test_a_dry_run_counts_what_is_held(
    kind: str, dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_train("method=dora", "budget=r1", f"model.quantization={kind}", "dry_run=true") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"quantised {kind}, 12 linear layers; the model is held in 0.0 MB" in printed
    assert "memory" in printed and not (tmp_path / "run").exists()
