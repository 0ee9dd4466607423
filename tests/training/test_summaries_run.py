"""Small encoder-decoders, tuned on summaries: pruned, resumed, merged, read by PEFT, and what they write."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.cli import train
from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge
from dora_cli.evaluation.summaries import Rouge

WORDS = ["red", "green", "blue", "one", "two", "three", "say", "and", "then", "again"]
STEPS = [
    "train.max_steps=24",
    "train.save_every=8",
    "train.eval_every=24",
    "train.log_every=8",
    "train.keep_last=9",
    "seed=3",
]
METHOD = ["method=dora", "budget=r2", "adapter.rank=4", "schedule.start=4", "schedule.end=12", "allocator.interval=4"]
HARD = ["adapter.dropout=0.1", "train.gradient_checkpointing=true", "train.accumulation=2"]


def make_model(kind: str, folder: Path) -> Path:
    """BART with its tied head and a position for every token; T5 with its bias of relative positions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BartConfig,
        BartModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5ForConditionalGeneration,
    )

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", "<s>", *WORDS])}
    rust = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    form = "<s> $A </s>" if kind == "bart" else "$A </s>"
    rust.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 3), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=rust, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": len(vocabulary), "d_model": 16, "pad_token_id": 0, "eos_token_id": 2}
    if kind == "bart":
        sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
                 (("layers", 1), ("attention_heads", 4), ("ffn_dim", 32))}  # fmt: skip
        more = {"max_position_embeddings": 32, "decoder_start_token_id": 2, "bos_token_id": 3, "init_std": 0.4}
        # As facebook/bart-base is saved: the body alone, whose names have no prefix.
        BartModel(BartConfig(**common, **sizes, **more, forced_bos_token_id=3)).save_pretrained(folder)
    else:
        more = {"d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
        T5ForConditionalGeneration(T5Config(**common, **more, initializer_factor=1.5)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was said first is the summary."""
    folder, draw = tmp_path_factory.mktemp("articles"), random.Random(0)
    for split, n in (("train", 64), ("validation", 6)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(n):
                said = draw.choices(WORDS[:6], k=draw.randint(1, 3))
                text = f"say {' and '.join(said)} then {' '.join(draw.choices(WORDS[6:], k=draw.randint(1, 6)))}"
                file.write(json.dumps({"document": text, "summary": "\n".join(said), "id": f"r{i}"}) + "\n")
    return folder


@pytest.fixture
def tune(articles: Path, tmp_path: Path) -> Callable[..., int]:
    def run(model: Path, *words: str) -> int:
        common = ["recipe=xsum", f"model.name={model}", f"data.path={articles}", "train.batch_size=8"]
        short = ["data.max_length=24", "data.max_target_length=8", "data.max_new_tokens=6"]
        out = [] if any(w.startswith("out=") for w in words) else [f"out={tmp_path}/run"]
        return train.main([*common, *short, "train.learning_rate=0.02", *out, *words])

    return run


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_it_learns_prunes_resumes_to_the_same_bits_merges_and_writes(
    kind: str,
    tune: Callable[..., int],
    articles: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = make_model(kind, tmp_path / "model")
    capfd.readouterr()
    assert tune(model, *METHOD, *STEPS, *HARD, f"out={tmp_path}/whole") == 0
    whole = tmp_path / "whole"
    summary = json.loads((whole / "summary.json").read_text())
    # Three attentions of q, k, v and o, the one across among them, and two feed-forwards of two layers.
    assert len(summary["ranks"]) == 16 and sum(summary["ranks"].values()) == 2 * 16
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["split"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    assert not capfd.readouterr().err, "transformers keeps its remarks to itself"

    # ---- resumed from what a process that was killed after its first checkpoint has left
    shutil.copytree(whole / "checkpoints/step-00000008", tmp_path / "run/checkpoints/step-00000008")
    assert tune(model, *METHOD, *STEPS, *HARD, "resume=true") == 0
    one, two = (load_file(tmp_path / r / "adapter/adapter_model.safetensors") for r in ("run", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

    # ---- merged, and through PEFT
    run = tmp_path / "run"
    assert dora_merge([f"checkpoint={run}", f"out={tmp_path}/merged"]) == 0
    draw = torch.Generator().manual_seed(0)
    read, written = (torch.randint(3, 14, (3, n), generator=draw) for n in (12, 7))
    base = AutoModelForSeq2SeqLM.from_pretrained(model)
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    plain = base(input_ids=read, decoder_input_ids=written).logits
    through_peft = PeftModel.from_pretrained(base, run / "adapter")(input_ids=read, decoder_input_ids=written).logits
    logits = merged(input_ids=read, decoder_input_ids=written).logits
    assert torch.allclose(through_peft, logits, atol=1e-5)
    assert (plain - logits).abs().max() > 1e-3
    assert json.loads((run / "adapter/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"

    # ---- evaluated: as the merged model writes through transformers, one row at a time
    words = ["data.metrics=[rouge1,rougeLsum,perplexity]", "data.num_beams=3", "train.eval_batch_size=5"]
    assert dora_eval([f"checkpoint={run}", *words, f"out={tmp_path}/eval"]) == 0
    metrics = json.loads((tmp_path / "eval/eval-validation.json").read_text())["metrics"]
    told = json.loads((run / "summary.json").read_text())["metrics"]["validation"]
    assert metrics["perplexity"] == pytest.approx(told["perplexity"], rel=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "eval/predictions-validation.jsonl").read_text().splitlines()]
    assert metrics["loss"] == pytest.approx(sum(r["loss"] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows))
    assert metrics["rouge1"] == pytest.approx(
        Rouge(["rouge1"]).mean((r["prediction"], r["reference"]) for r in rows)["rouge1"]
    )
    assert len({row["prediction"] for row in rows}) > 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for row, line in zip(rows, (articles / "validation.jsonl").read_text().splitlines(), strict=True):
        given = json.loads(line)
        assert (row["id"], row["reference"]) == (given["id"], given["summary"])
        inputs = tokenizer(given["document"], return_tensors="pt")
        search = {"num_beams": 3, "no_repeat_ngram_size": 3, "max_new_tokens": 6}
        said = merged.generate(**{k: inputs[k] for k in ("input_ids", "attention_mask")}, **search)
        assert row["prediction"] == tokenizer.decode(said[0], skip_special_tokens=True).strip()


def test_a_model_of_another_kind_is_refused(
    tune: Callable[..., int], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(model_dir, "method=lora", "budget=r2") == 2
    assert "encoder-decoder such as BART or T5" in capsys.readouterr().err
    bart = make_model("bart", tmp_path / "bart")
    (tmp_path / "text.jsonl").write_text('{"text": "red green"}\n' * 4)
    plain = [f"data.path={tmp_path}/text.jsonl", f"model.name={bart}", f"out={tmp_path}/run", "data.max_length=16"]
    assert train.main(["recipe=clm_text", "method=lora", "budget=r2", *plain]) == 2
    assert "is an encoder-decoder" in capsys.readouterr().err
    assert tune(bart, "method=lora", "budget=r2", "data.max_target_length=33") == 2
    assert "data.max_target_length=33 is more than the 32 positions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
