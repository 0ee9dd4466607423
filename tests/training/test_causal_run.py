"""A small decoder with tied embeddings, tuned on conversations: pruned, resumed, merged, read by PEFT."""

import json
import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.cli import train
from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge

WORDS = ["red", "green", "blue", "one", "two", "three", "say", "again", "user", "assistant"]
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
STEPS = ["train.max_steps=24", "train.save_every=8", "train.eval_every=24", "train.log_every=4", "seed=3"]
METHOD = ["method=dora", "budget=r2", "adapter.rank=4", "schedule.start=4", "schedule.end=16", "allocator.interval=4"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("decoder")
    special = ["<pad>", "<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    rust = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.4,  # frozen words must differ, or nothing can be said
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Say a word: hear it again."""
    folder, draw = tmp_path_factory.mktemp("chats"), random.Random(0)
    for split, n in (("train", 64), ("validation", 16)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(n):
                messages = []
                for _ in range(draw.randint(1, 3)):
                    word = draw.choice(WORDS[:6])
                    messages += [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
                file.write(json.dumps({"messages": messages}) + "\n")
    return folder


@pytest.fixture
def tune(decoder: Path, chats: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*words: str) -> int:
        common = ["recipe=sft_chat", f"model.name={decoder}", f"data.path={chats}", "train.batch_size=8"]
        out = [] if any(w.startswith("out=") for w in words) else [f"out={tmp_path}/run"]
        return train.main([*common, "train.learning_rate=0.02", *out, *words])

    return run


def test_it_learns_and_stays_on_budget(tune: Callable[..., int], tmp_path: Path) -> None:
    assert tune(*METHOD, *STEPS, "train.max_steps=80", "train.eval_every=40") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert sum(summary["ranks"].values()) == 28  # two for each of fourteen modules
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["split"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    validation = summary["metrics"]["validation"]
    assert validation["perplexity"] == pytest.approx(torch.tensor(validation["loss"]).exp().item(), rel=1e-5)


def test_adapted_merged_and_pefts_logits_agree_and_evaluations_too(
    tune: Callable[..., int], decoder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert tune(*METHOD, *STEPS) == 0
    run = tmp_path / "run"
    assert dora_merge([f"checkpoint={run}", f"out={tmp_path}/merged"]) == 0
    tokens = torch.randint(5, 15, (3, 12), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(decoder)
    plain = base(tokens).logits
    through_peft = PeftModel.from_pretrained(base, run / "adapter")(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    assert torch.allclose(through_peft, merged, atol=1e-5)
    assert (plain - merged).abs().max() > 1e-3
    assert dora_eval([f"checkpoint={run}", f"out={tmp_path}/one"]) == 0
    assert dora_eval([f"checkpoint={tmp_path}/merged", f"recipe={run}/config.yaml", f"out={tmp_path}/two"]) == 0
    one, two = (json.loads((tmp_path / n / "eval-validation.json").read_text()) for n in ("one", "two"))
    assert one["metrics"]["loss"] == pytest.approx(two["metrics"]["loss"], abs=1e-5)
    assert one["metrics"] == pytest.approx(json.loads((run / "summary.json").read_text())["metrics"]["validation"])
    rows = [json.loads(line) for line in (tmp_path / "one/predictions-validation.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    right = sum(r["right"] for r in rows) / sum(r["tokens"] for r in rows)
    assert dora_eval([f"checkpoint={run}", "data.metrics=[token_accuracy]", f"out={tmp_path}/three"]) == 0
    three = json.loads((tmp_path / "three/eval-validation.json").read_text())
    assert three["metrics"]["token_accuracy"] == pytest.approx(right)
    mean = sum(r["loss"] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows)
    assert mean == pytest.approx(one["metrics"]["loss"], rel=1e-4)


def test_what_it_writes_is_compared_with_what_it_should_say(tune: Callable[..., int], tmp_path: Path) -> None:
    """By hand, token by token without a cache or padding, it writes the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert tune(*METHOD, *STEPS, "train.max_steps=80", "train.eval_every=80", "save.merged=true") == 0
    run, words = tmp_path / "run", ["data.metrics=[exact_match,perplexity]", "data.max_new_tokens=3"]
    assert dora_eval([f"checkpoint={run}", *words, "train.eval_batch_size=5", f"out={tmp_path}/one"]) == 0
    assert dora_eval([f"checkpoint={run}", *words, "data.answer=[a-z]+e$", f"out={tmp_path}/two"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "one/predictions-validation.jsonl").read_text().splitlines()]
    metrics = json.loads((tmp_path / "one/eval-validation.json").read_text())["metrics"]
    assert metrics["exact_match"] == sum(r["prediction"] == r["reference"] for r in rows) / 16
    assert metrics["exact_match"] > 0.3, "it has learned to say again what was said"

    model = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    lines = (run / "config.yaml").read_text().splitlines()
    data = next(Path(line.split("path: ")[1]) for line in lines if line.startswith("  path: /"))
    for row, line in zip(rows, (data / "validation.jsonl").read_text().splitlines(), strict=True):
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        before = tokens.shape[1]
        for _ in range(3):
            following = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
            if int(following) in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
                break
            tokens = torch.cat([tokens, following], dim=1)
        assert row["prediction"] == tokenizer.decode(tokens[0, before:], skip_special_tokens=True)
        assert row["reference"] == messages[-1]["content"]
    two = json.loads((tmp_path / "two/eval-validation.json").read_text())["metrics"]
    ending = [re.search("[a-z]+e$", r["reference"]) for r in rows]
    said = [re.search("[a-z]+e$", r["prediction"]) for r in rows]
    right = sum(bool(e and s and e[0] == s[0]) for e, s in zip(ending, said, strict=True))
    assert two["exact_match"] == right / 16


def test_an_interrupted_run_goes_on_to_the_same_bits(
    tune: Callable[..., int], unplugged_at: Callable[[int], AbstractContextManager[None]], tmp_path: Path
) -> None:
    assert tune(*METHOD, *STEPS, "adapter.dropout=0.1", f"out={tmp_path}/whole") == 0
    with unplugged_at(8):
        tune(*METHOD, *STEPS, "adapter.dropout=0.1")
    assert tune(*METHOD, *STEPS, "adapter.dropout=0.1", "resume=true") == 0
    one, two = (load_file(tmp_path / r / "adapter/adapter_model.safetensors") for r in ("run", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_an_evaluation_is_over_tokens_whatever_the_batches(tune: Callable[..., int], tmp_path: Path) -> None:
    common = ["method=lora", "budget=r2", "train.max_steps=6", "train.eval_every=6"]
    assert tune(*common, f"out={tmp_path}/one") == 0
    assert tune(*common, "train.eval_batch_size=3", f"out={tmp_path}/two") == 0
    one, two = (json.loads((tmp_path / n / "summary.json").read_text())["metrics"] for n in ("one", "two"))
    assert one["validation"]["loss"] == pytest.approx(two["validation"]["loss"], rel=1e-5)


def test_the_dry_run_shows_two_rows_as_the_model_sees_them(
    tune: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert tune("method=lora", "budget=r1", "dry_run=true") == 0
    said = capsys.readouterr().out
    shown = said[said.index("examples") :]
    assert "learned (in brackets)" in shown
    assert "<|im_start|> assistant [" in " ".join(shown.split())
    assert "[<|im_end|>]" in shown
    assert not (tmp_path / "run").exists()


def test_packed_rows_learn_and_go_on_to_the_same_bits(tune: Callable[..., int], tmp_path: Path) -> None:
    words = ["method=lora", "budget=r2", "data.packing=true", "data.max_length=48", "train.max_steps=8"]
    words += ["train.batch_size=2", "train.save_every=4", "train.eval_every=8"]
    assert tune(*words, f"out={tmp_path}/one") == 0
    assert tune(*words, f"out={tmp_path}/two", "resume=true") == 0
    one, two = (load_file(tmp_path / r / "adapter/adapter_model.safetensors") for r in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_model_whose_documents_would_see_each_other_is_refused(
    tune: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    assert tune("method=lora", "budget=r2", "data.packing=true") == 2
    assert "lets the documents of a row see each other" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_only_language_models_have_documents_to_pack(
    dora_train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_train("method=lora", "budget=r2", "data.packing=true") == 2
    assert "data.packing is read by data.task=sft and clm, not by classification" in capsys.readouterr().err
