"""The recipes for decoders of 1B to 8B on tiny ones: bfloat16, packed, resumed, merged, evaluated as in training."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.cli import train, train_run
from dora_cli.cli.eval import main as dora_eval
from dora_cli.training import setup


class Unplugged(BaseException):
    """The plug is pulled."""


WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "say",
    "user",
    "assistant",
    "system",
    "26",
    "Jul",
    "2024",
    "<think>",
    "</think>",
]
# Like Qwen3's: the turns after the last question have thoughts, earlier ones lose theirs.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|> {{ m.role }} "
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think> </think> {% endif %}"
    "{{ m.content.split('</think>')[-1] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
# Like Llama 3's: the day stands in it.
LLAMA = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|> system {{ date_string }} <|im_end|>\n"
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content | trim }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
TINY = ["data.max_length=64", "budget=r2", "adapter.rank=4", "allocator.interval=1", "train.learning_rate=0.02"]
STEPS = ["train.max_steps=4", "train.save_every=2", "train.eval_every=4", "train.device=cpu"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 conversations of one to three turns each; 8 to evaluate on, in the split that the data's own is called."""
    folder, draw = tmp_path_factory.mktemp("chats"), random.Random(0)
    for split, n in (("train", 40), ("test", 8)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(n):
                messages = []
                for word in draw.choices(WORDS[:6], k=draw.randint(1, 3)):
                    messages += [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
                file.write(json.dumps({"messages": messages}) + "\n")
    return folder


@pytest.fixture(scope="module")
def decoders(save_decoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoders")
    return {
        kind: save_decoder(root / kind, WORDS, template, kind, torch.bfloat16)
        for kind, template in (("Qwen3", QWEN3), ("Llama", LLAMA))
    }


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_a_recipe_runs_from_conversations_to_a_merged_model(
    kind: str,
    decoders: dict[str, Path],
    chats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM

    sessions: list[setup.Session] = []
    real = train_run.build
    monkeypatch.setattr(train_run, "build", lambda *a: sessions.append(real(*a)) or sessions[-1])
    words = [f"recipe={kind.lower()}_sft", f"model.name={decoders[kind]}", f"data.path={chats}", *TINY, *STEPS]
    assert train.main([*words, f"out={tmp_path}/run", "save.merged=true"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "documents packed into" in said
    assert ("earlier turns anew" in said) is (kind == "Qwen3")
    if kind == "Llama":  # the same rows on any day
        assert "Jul 2024" in sessions[0].tokenizer.decode(sessions[0].encoded["train"].batch([0])["input_ids"][0])

    session = sessions[0]
    kinds = {p.requires_grad: p.dtype for p in session.model.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert session.model.config._attn_implementation == "sdpa"
    assert all(m.gradient_checkpointing for m in session.model.modules() if hasattr(m, "gradient_checkpointing"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert sum(summary["ranks"].values()) == 28

    # By itself the same numbers, but for what folding c into b rounds in bfloat16.
    assert dora_eval([f"checkpoint={tmp_path}/run", f"out={tmp_path}/eval"]) == 0
    alone = json.loads((tmp_path / "eval/eval-validation.json").read_text())
    assert alone["rows"] >= 8, "the split 'test' is what is evaluated"
    assert alone["metrics"]["loss"] == pytest.approx(summary["metrics"]["validation"]["loss"], rel=3e-3)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged", dtype="auto")
    assert merged.dtype == torch.bfloat16

    if kind == "Llama":
        return
    # Interrupted after its first checkpoint and resumed: the same bits.
    save = train_run.save_checkpoint

    def unplug(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        raise Unplugged

    with monkeypatch.context() as patch, pytest.raises(Unplugged):
        patch.setattr(train_run, "save_checkpoint", unplug)
        train.main([*words, f"out={tmp_path}/two"])
    assert train.main([*words, f"out={tmp_path}/two", "resume=true"]) == 0
    one, two = (load_file(tmp_path / r / "adapter/adapter_model.safetensors") for r in ("run", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
