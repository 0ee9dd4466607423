"""Tokens that the user adds: their embeddings train, are saved, merged, and read by PEFT; all others stay."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_cli.errors import UserError

CLASSIFIER, LANGUAGE = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
WORDS = ["w41", "w40", "<|go|>"]  # the first two stand in no text of this test's own
ADD = f"model.add_tokens={json.dumps(WORDS)}"


def through_peft(run: Any, tokenizer: Any) -> Any:
    """As anybody loads it: the base, resized for the adapter's tokenizer, and then the adapter."""
    from peft import PeftModel

    model = run.base()
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, run.out / "adapter")


@pytest.mark.parametrize(
    ("kind", "auto_class", "rows"),
    [
        ("qwen3", LANGUAGE, 44),  # tied, no row to spare
        ("llama", LANGUAGE, 44),  # an output of its own
        ("gemma3", LANGUAGE, 60),  # scales what it looks up; rows to spare
        # tied to an output that the classifier does not have
        pytest.param("qwen3", CLASSIFIER, 44, marks=pytest.mark.slow),
        pytest.param("bert", CLASSIFIER, 44, marks=pytest.mark.slow),
    ],
)
def test_new_tokens_are_trained_and_the_same_everywhere(
    kind: str,
    auto_class: str,
    rows: int,
    save_base: Callable[..., Path],
    tune_twice: Callable[..., Any],
    texts: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoTokenizer

    from dora_cli.cli.eval import main as dora_eval
    from dora_cli.cli.merge import main as dora_merge

    save_base(kind, auto_class, "AutoModelForMaskedLM" if kind == "bert" else LANGUAGE, vocab_size=rows)
    data = place / "data"
    data.mkdir()
    for split in ("train", "validation"):
        text = (texts / f"{split}.jsonl").read_text()
        (data / f"{split}.jsonl").write_text(text.replace('"w1 ', f'"{WORDS[0]} ').replace('"w2 ', f'"{WORDS[2]} '))
    whole, run = tune_twice(auto_class, ADD, f"data.path={data}")
    size = max(rows, 47)

    saved, resumed = (load_file(r.out / "adapter/adapter_model.safetensors") for r in (whole, run))
    assert all(torch.equal(saved[name], resumed[name]) for name in saved)
    ends = [name for name in saved if "trainable_tokens" in name]
    assert len(ends) == (2 if kind == "llama" else 1)
    assert all(saved[name].shape == (3, 16) for name in ends)

    tokenizer = AutoTokenizer.from_pretrained(run.out / "adapter")
    assert tokenizer.convert_tokens_to_ids(WORDS) == [44, 45, 46]
    assert tokenizer.decode([46, 5], skip_special_tokens=True) == "w1"
    assert dora_merge([f"checkpoint={run.out}", f"out={place}/merged"]) == 0
    merged = run.load(place / "merged")
    assert len(AutoTokenizer.from_pretrained(place / "merged")) == 47
    assert merged.config.vocab_size == size
    embedding, before = merged.get_input_embeddings().weight, run.base().get_input_embeddings().weight
    assert embedding.shape[0] == size and torch.equal(embedding[:44], before[:44])
    assert len({tuple(row) for row in embedding[44:47].tolist()}) == 3

    trained: Tensor = run.logits(run.session.model, top=47)
    assert torch.allclose(run.logits(merged, top=47), trained, atol=1e-5)
    assert torch.allclose(run.logits(through_peft(run, tokenizer), top=47), trained, atol=1e-5)

    capsys.readouterr()
    assert dora_eval([f"checkpoint={run.out}"]) == 0
    result = json.loads((run.out / "eval-validation.json").read_text())["metrics"]
    expected = json.loads((run.out / "summary.json").read_text())["metrics"]["validation"]
    assert result == pytest.approx({name: expected[name] for name in result}, rel=1e-5)


def test_what_peft_has_trained_of_new_tokens_is_merged(save_base: Callable[..., Path], place: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    from dora_cli.checkpoints.merge import merge

    base = save_base("qwen3", LANGUAGE, LANGUAGE, vocab_size=44)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(46)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[7, 44, 45], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(place / "adapter")
    config_file = place / "adapter" / "adapter_config.json"
    written = config_file.read_text()
    for wrong in ([], [44, 44, 45], [7, 45, 46], [-1, 44, 45], "abc", {"other": [7, 44, 45]}):
        config_file.write_text(json.dumps({**json.loads(written), "trainable_token_indices": wrong}))
        with pytest.raises(UserError, match=r"is damaged|does not fit"):
            merge(place / "adapter", place / "merged", base=str(base))
    config_file.write_text(written)
    report = merge(place / "adapter", place / "merged", base=str(base))
    assert report.tokens == 3
    ids = torch.arange(46)[None]
    expected, merged = adapted.eval(), transformers.AutoModelForCausalLM.from_pretrained(place / "merged")
    with torch.no_grad():
        assert torch.allclose(expected(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-5)

    # Some checkpoints hold a tied embedding twice: both copies get the rows, and an output that is another is refused.
    tensors = load_file(base / "model.safetensors")
    assert load_file(place / "merged/model.safetensors").keys() == tensors.keys()
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, base / "model.safetensors", {"format": "pt"})
    merge(place / "adapter", place / "twice", base=str(base))
    twice = load_file(place / "twice/model.safetensors")
    assert torch.equal(twice["lm_head.weight"], merged.lm_head.weight)
    assert torch.equal(twice["model.embed_tokens.weight"], merged.lm_head.weight)
    save_file({**tensors, "lm_head.weight": embedding + 1}, base / "model.safetensors", {"format": "pt"})
    config_file.write_text(
        json.dumps({**json.loads(written), "trainable_token_indices": {"embed_tokens": [7, 44, 45]}})
    )
    weights = load_file(place / "adapter/adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "lm_head" not in k}, place / "adapter/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"'lm_head.weight' of .* has a row for each of 44 tokens"):
        merge(place / "adapter", place / "refused", base=str(base))


def test_rows_are_scaled_and_rounded_as_those_of_the_base_are(tiny_models: Any) -> None:
    """Gemma 3 multiplies what it looks up by the square root of its width, in the type of its weights."""
    import transformers

    from dora_cli.adapters.token_rows import TokenEmbedding
    from dora_cli.training.setup import lower

    model: Any = transformers.AutoModel.from_config(tiny_models.make_config("gemma3", hidden_size=20))
    lower(model.requires_grad_(False), torch.bfloat16)
    base = model.get_input_embeddings()
    tokens = torch.tensor([[4, 50]])
    assert torch.allclose(TokenEmbedding(base, [50])(tokens), base(tokens), rtol=0, atol=0)


def test_rows_have_the_gradient_of_the_whole_matrix(tiny_models: Any) -> None:
    """Tied: from both sides; and nothing else of the embedding has one."""
    import transformers

    from dora_cli.adapters.token_rows import train_rows

    ids = torch.tensor([[4, 50, 5, 51, 50, 6]])
    gradients = []
    for by_rows in (False, True):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(tiny_models.make_config("qwen3")).double()
        weight = model.get_input_embeddings().weight
        if by_rows:
            model.requires_grad_(False)
            layers = train_rows(model, "model.embed_tokens", "lm_head", [50, 51])
            assert list(layers) == ["model.embed_tokens"]
            rows = layers["model.embed_tokens"].double().rows
            model.lm_head.rows = rows
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(rows.grad if by_rows else weight.grad[[50, 51]])
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)
    assert weight.grad is None


@pytest.mark.parametrize(
    ("kind", "auto_class", "words", "message"),
    [
        ("phi", LANGUAGE, [], "has a bias"),
        ("mixtral", LANGUAGE, ["method=full", "model.add_tokens=[]"], "trains the experts of a mixture"),
        ("t5", CLASSIFIER, [], "several input embeddings"),
        ("llama", LANGUAGE, ["adapter.targets=[lm_head]"], "model.add_tokens trains rows of it"),
        ("llama", LANGUAGE, ["method=full"], "no place for new embeddings"),
        ("llama", LANGUAGE, ["model.add_tokens=[a,a]"], "is there once"),
    ],
)
def test_where_they_cannot_be_trained_is_said(
    kind: str, auto_class: str, words: list[str], message: str, save_base: Any, texts: Path, place: Path, capsys: Any
) -> None:
    from dora_cli.cli.train import main

    save_base(kind, auto_class, "AutoModel" if kind == "t5" else LANGUAGE)
    recipe = "clm_text" if auto_class == LANGUAGE else "text_classification"
    common = [f"recipe={recipe}", f"model.name={place}/base", f"data.path={texts}", f"out={place}/refused"]
    common += ["data.max_length=12", "budget=r1", *([] if "model.add" in "".join(words) else [ADD])]
    assert main([*common, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "refused").exists()
