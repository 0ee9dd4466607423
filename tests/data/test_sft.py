"""Which tokens of a conversation are learned, token by token; and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dora_cli.data.sources import load_rows
from dora_cli.data.tasks import build_task
from dora_cli.data.tasks.conversations import Chat
from dora_cli.data.token_rows import IGNORED
from dora_cli.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
# As Qwen3's: the last answer begins with an empty thought, and earlier ones lose it.
THINKING = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} "
    "{% if m['role'] == 'assistant' and loop.last %}<think> </think> {% endif %}{{ m['content'] }} <|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% endfor %}"
)
WORDS = ["user", "assistant", "system", "hello", "there", "what", "is", "it", "a", "cat", "yes", "no", "two", "three"]
WORDS += ["###", "Instruction:", ":", "Input", "Response"]


def tokenizer(template: str | None = None, *, bos: bool = False) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    rust = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=rust, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    made.padding_side = "right"
    return made


def build(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"task": "sft", "columns": {}, "labels": None, "metrics": [], "max_length": 64, "cache": None}
    source = {"name": None, "config": None, "path": str(file), "splits": {}, "max_train_samples": None}
    more = {"max_eval_samples": None, "holdout": 0.1, "template": None, "answer": None, "max_new_tokens": 8}
    choice = SimpleNamespace(**{**config, **source, **more, **options})
    loaded = load_rows(choice, offline=True, seed=1, roles=["train"])
    task = build_task(choice)
    task.fit(loaded)
    return task, loaded.splits["train"]


def words(made: Any, encoded: Any, row: int = 0) -> tuple[list[str], list[str]]:
    """The tokens of a row, and those of them that are learned."""
    example = encoded[row]
    tokens = made.convert_ids_to_tokens(example["input_ids"].tolist())
    kept = [t for t, label in zip(tokens, example["labels"].tolist(), strict=True) if label != IGNORED]
    assert all(label in (IGNORED, i) for i, label in zip(example["input_ids"], example["labels"], strict=True))
    return tokens, kept


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_only_the_assistants_turns_are_learned_each_with_its_end(tmp_path: Path) -> None:
    chat = turns(
        ("system", "yes"), ("user", "hello there"), ("assistant", "a cat"), ("user", "what"), ("assistant", "no")
    )
    made = tokenizer(CHATML)
    task, rows = build(tmp_path, [{"messages": chat}])
    tokens, learned = words(made, task.encode(rows, made))
    assert " ".join(tokens) == (
        "<|im_start|> system yes <|im_end|> <|im_start|> user hello there <|im_end|> <|im_start|> assistant a cat "
        "<|im_end|> <|im_start|> user what <|im_end|> <|im_start|> assistant no <|im_end|>"
    )
    assert learned == ["a", "cat", "<|im_end|>", "no", "<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_gives_a_row_a_turn(tmp_path: Path) -> None:
    chat = turns(("user", "hello"), ("assistant", "a cat"), ("user", "what"), ("assistant", "no"))
    made = tokenizer(THINKING)
    task, rows = build(tmp_path, [{"messages": chat, "id": "one"}, {"messages": chat[:2], "id": "two"}])
    encoded = task.encode(rows, made)
    learned = [words(made, encoded, i)[1] for i in range(len(encoded))]
    thought = ["<think>", "</think>"]
    assert learned == [
        [*thought, "a", "cat", "<|im_end|>"],
        [*thought, "no", "<|im_end|>"],
        [*thought, "a", "cat", "<|im_end|>"],
    ]
    assert words(made, encoded, 1)[0][6:9] == ["a", "cat", "<|im_end|>"], "what came before is without thoughts"
    assert encoded.ids == ["one", "one", "two"]
    assert [encoded.place(i) for i in range(3)] == [0, 0, 1]
    assert any("1 conversations became a row for each" in note for note in encoded.notes)


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_completion_without_a_chat_template(bos: bool, tmp_path: Path) -> None:
    made = tokenizer(bos=bos)
    task, rows = build(tmp_path, [{"prompt": "what is it", "completion": "a cat"}])
    tokens, learned = words(made, task.encode(rows, made))
    assert tokens == [*(["<s>"] if bos else []), "what", "is", "it", "a", "cat", "</s>"]
    assert learned == ["a", "cat", "</s>"]


def test_an_end_that_the_tokenizer_writes_is_learned_and_not_written_twice(tmp_path: Path) -> None:
    from tokenizers import processors

    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    task, rows = build(tmp_path, [{"prompt": "what is it", "completion": "a cat"}])
    tokens, learned = words(made, task.encode(rows, made))
    assert tokens == ["<s>", "what", "is", "it", "a", "cat", "</s>"]
    assert learned == ["a", "cat", "</s>"]


@pytest.mark.parametrize("template", ["what {prompt} :", "what {prompt} : "])
def test_a_token_that_joins_the_prompts_last_space_and_an_answer_is_learned(template: str, tmp_path: Path) -> None:
    """As Llama's and GPT-2's do: a word has the space before it in its token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *(f"▁{word}" for word in WORDS)])}
    rust = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    completion = "a cat" if template.endswith(" ") else " a cat"
    task, rows = build(tmp_path, [{"prompt": "is it", "completion": completion}], template=template)
    tokens, learned = words(made, task.encode(rows, made))
    assert tokens == ["▁what", "▁is", "▁it", "▁:", "▁a", "▁cat", "</s>"]
    assert learned == ["▁a", "▁cat", "</s>"]


def test_what_a_chat_template_writes_behind_a_turns_end_is_not_learned() -> None:
    chat = turns(("user", "what"), ("assistant", "a cat"), ("user", "it"), ("assistant", "no"))
    (passage,) = Chat(tokenizer(CHATML)).passages(chat)
    assert [passage.text[start:end] for start, end in passage.learned] == ["a cat <|im_end|>", "no <|im_end|>"]


def test_columns_that_were_named_decide_the_shape_and_must_be_there(tmp_path: Path) -> None:
    row = {"messages": turns(("user", "it"), ("assistant", "yes")), "prompt": "what", "completion": "no"}
    made = tokenizer(CHATML)
    task, rows = build(tmp_path, [row], columns={"prompt": "prompt", "completion": "completion"})
    assert words(made, task.encode(rows, made))[1] == ["no", "<|im_end|>"]
    task, rows = build(tmp_path, [row])
    assert words(made, task.encode(rows, made))[1] == ["yes", "<|im_end|>"]
    with pytest.raises(UserError, match="no column 'nowhere'"):
        build(tmp_path, [row], columns={"id": "nowhere"})
    with pytest.raises(UserError, match="no column 'contxt'"):
        build(tmp_path, [{"instruction": "a", "input": "b", "output": "c"}], columns={"input": "contxt"})


def test_a_prompt_becomes_a_conversation_where_there_is_a_chat_template(tmp_path: Path) -> None:
    made = tokenizer(CHATML, bos=True)
    task, rows = build(tmp_path, [{"instruction": "what is", "input": "it", "output": "a cat"}])
    tokens, learned = words(made, task.encode(rows, made))
    assert " ".join(tokens) == "<|im_start|> user what is it <|im_end|> <|im_start|> assistant a cat <|im_end|>"
    assert learned == ["a", "cat", "<|im_end|>"]


def test_alpacas_wording_with_and_without_an_input(tmp_path: Path) -> None:
    made = tokenizer()
    rows_in = [
        {"instruction": "what is", "input": "", "output": "a cat"},
        {"instruction": "is", "input": "it", "output": "no"},
    ]
    task, rows = build(tmp_path, rows_in)
    encoded = task.encode(rows, made)
    assert [words(made, encoded, i)[1] for i in (0, 1)] == [["a", "cat", "</s>"], ["no", "</s>"]]
    assert "Input" not in " ".join(words(made, encoded, 0)[0])


def test_a_template_and_columns_of_ones_own(tmp_path: Path) -> None:
    made = tokenizer(CHATML)
    rows_in = [{"question": "what is", "answer": "a cat", "hint": "two"}]
    task, rows = build(
        tmp_path, rows_in, columns={"prompt": "question", "completion": "answer"}, template="it {hint} {question} : "
    )
    tokens, learned = words(made, task.encode(rows, made))
    assert tokens == ["it", "two", "what", "is", ":", "a", "cat", "</s>"]
    assert learned == ["a", "cat", "</s>"]


def test_sharegpts_names_are_known(tmp_path: Path) -> None:
    made = tokenizer(CHATML)
    chat = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "no"}]
    task, rows = build(tmp_path, [{"conversations": chat}], columns={"messages": "conversations"})
    assert words(made, task.encode(rows, made))[1] == ["no", "<|im_end|>"]


def test_long_rows_are_cut_and_those_with_nothing_left_are_left_out(tmp_path: Path) -> None:
    made = tokenizer()
    rows_in = [
        {"prompt": "what is it", "completion": "a cat"},
        {"prompt": "what is it what is", "completion": "no"},
        {"prompt": "it", "completion": "no"},
    ]
    task, rows = build(tmp_path, rows_in, max_length=4)
    encoded = task.encode(rows, made)
    assert [words(made, encoded, i) for i in (0, 1)] == [
        (["what", "is", "it", "a"], ["a"]),
        (["it", "no", "</s>"], ["no", "</s>"]),
    ]
    assert (encoded.truncated, [encoded.place(i) for i in (0, 1)], encoded.ids) == (2, [0, 2], [0, 2])
    assert encoded.notes == ["1 rows left out: nothing to learn within 4 tokens"]
    with pytest.raises(UserError, match="no row of this split has anything to learn"):
        build(tmp_path, rows_in[1:2], max_length=4)[0].encode(rows.select([1]), made)


def test_a_tokenizer_written_in_python_learns_the_same(tmp_path: Path) -> None:
    class Slow:
        """Asked as one that cannot say where a token comes from."""

        is_fast, add_bos_token = False, False

        def __init__(self, fast: Any) -> None:
            self.fast = fast

        def __getattr__(self, name: str) -> Any:
            return getattr(self.fast, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return self.fast(*args, **options)

    made = tokenizer(CHATML)
    chat = turns(("user", "hello there"), ("assistant", "a cat"), ("user", "what"), ("assistant", "no"))
    task, rows = build(tmp_path, [{"messages": chat}])
    fast, slow = task.encode(rows, made), task.encode(rows, Slow(made))
    assert all(torch.equal(fast.ragged[name], slow.ragged[name]) for name in ("input_ids", "labels"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": turns(("user", "hello"))}, "'messages' has no assistant turn"),
        ({"messages": []}, "'messages' is no list of messages"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "unknown role 'pirate'"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 whose content is no text"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": turns(("assistant", "hello"))}, "begins with the assistant"),
        ({"messages": turns(("user", "hello"), ("assistant", " "))}, "an assistant turn that says nothing .message 2"),
        (
            {"messages": [*turns(("user", "x")), {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "message 2 with tool calls",
        ),
        ({"prompt": "x", "completion": "  "}, "'completion' is empty"),
        ({"prompt": None, "completion": "x"}, "'prompt' is missing"),
        ({"instruction": 3, "output": "x"}, "'instruction' is no text"),
    ],
)
def test_a_row_without_anything_to_learn_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"messages": turns(("user", "a"), ("assistant", "b"))} if "messages" in row else dict.fromkeys(row, "x")
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path, [good, row] if row.get("instruction") != 3 else [row])
    assert "rows.jsonl, line" in str(caught.value.where)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{nothing}"}, "names '{nothing}', and there is no such column"),
        ({"template": "{prompt.__class__}"}, "no such column"),
        ({"template": "{prompt"}, "malformed"),
        ({"columns": {"prompt": "nowhere"}}, "no column 'nowhere'"),
        ({"columns": {"promt": "prompt"}}, "unknown key 'data.columns.promt'"),
        ({"labels": ["a", "b"]}, "data.labels has no meaning"),
    ],
)
def test_what_can_be_known_beforehand_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, [{"prompt": "x", "completion": "y"}], **options)


def test_messages_need_a_chat_template_that_takes_them(tmp_path: Path) -> None:
    chat = [{"messages": turns(("system", "a"), ("user", "b"), ("assistant", "c"))}]
    task, rows = build(tmp_path, chat)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        task.encode(rows, tokenizer())
    with pytest.raises(UserError, match=r"^its conversation is refused .*no system turns\n.*rows.jsonl, line 1"):
        task.encode(rows, tokenizer(STRICT))
    with pytest.raises(UserError, match=r"data\.template is for rows with a prompt"):
        build(tmp_path, chat, template="{messages}")


def test_tokens_are_kept_until_anything_they_follow_from_changes(tmp_path: Path, monkeypatch: Any) -> None:
    from dora_cli.data import tokens

    monkeypatch.setattr(tokens, "CACHED_FROM", 0)
    made, kept = tokenizer(CHATML), tmp_path / "kept" / "tokens"
    rows_in = [
        {"prompt": "what is it", "completion": "a cat", "id": "x"},
        {"prompt": "it", "completion": "no", "id": "y"},
    ]

    def encode(**options: Any) -> Any:
        task, rows = build(tmp_path, rows_in, cache=str(tmp_path / "kept"), **options)
        return task.encode(rows, made)

    first, again = encode(), encode()
    assert len(list(kept.iterdir())) == 1
    assert again.ids == first.ids == ["x", "y"]
    assert all(torch.equal(first.batch([1, 0])[name], again.batch([1, 0])[name]) for name in first.batch([0]))
    for i, options in enumerate(({"max_length": 9}, {"template": "{prompt} : "}), start=2):
        encode(**options)
        assert len(list(kept.iterdir())) == i, options
    made.chat_template = CHATML.replace("<|im_end|>", "<|im_end|> yes")
    encode()
    assert len(list(kept.iterdir())) == 4
    rows_in[0]["completion"] = "two"
    encode()
    assert len(list(kept.iterdir())) == 5
    made.chat_template, rows_in[0]["completion"] = CHATML, "a cat"
    rows_in[0]["id"] = "z"
    assert encode().ids == ["z", "y"]
    assert len(list(kept.iterdir())) == 5, "names are no tokens"


# ---- the loss ----------------------------------------------------------------------------------------------------
def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tokenizer(CHATML)
    rows_in = [
        {"messages": turns(("user", "hello there"), ("assistant", "a cat"), ("user", "what"), ("assistant", "no"))},
        {"messages": turns(("user", "is it"), ("assistant", "yes"))},
    ]
    task, rows = build(tmp_path, rows_in)
    batch = task.encode(rows, made).batch([0, 1])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(made), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    found = task.loss(model, batch)
    assert found.n == task.count(batch) == 7
    assert float(found.total) / found.n == pytest.approx(float(model(**batch).loss), rel=1e-5)
    assert found.outputs[:, 1].tolist() == [5, 2]
    assert float(found.outputs[:, 0].sum()) == pytest.approx(float(found.total), rel=1e-6)


def test_gradients_of_micro_batches_add_up_to_those_of_the_whole(tmp_path: Path) -> None:
    """Weighted by tokens, whatever rows they come in."""
    made = tokenizer()
    words_in = ["a cat", "no", "yes no two three", "it is", "what"]
    task, rows = build(tmp_path, [{"prompt": "what is", "completion": word} for word in words_in])
    encoded = task.encode(rows, made)
    weight = torch.randn(len(made), len(made), generator=torch.Generator().manual_seed(0), requires_grad=True)

    def model(input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=F.embedding(input_ids, weight))

    def gradient(parts: list[range]) -> torch.Tensor:
        batches = [encoded.batch(part) for part in parts]
        count = sum(task.count(batch) for batch in batches)
        assert count == 15
        for batch in batches:
            (task.loss(model, batch).total / count).backward()
        total, weight.grad = weight.grad, None
        assert total is not None
        return total

    torch.testing.assert_close(gradient([range(3), range(3, 5)]), gradient([range(5)]), rtol=1e-5, atol=1e-7)
