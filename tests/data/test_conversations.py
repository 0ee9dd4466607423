"""Where a chat template lets an assistant's turn begin."""

from types import SimpleNamespace
from typing import Any

import pytest

from dora_cli.data.tasks.conversations import BadRow, Chat

TURNS = [
    {"role": role, "content": content}
    for role, content in [("user", "what"), ("assistant", "a cat"), ("user", "it"), ("assistant", "no")]
]


def chat(write: Any) -> Chat:
    """A template as a function: of the messages, and whether the assistant is to speak next."""
    return Chat(
        SimpleNamespace(
            apply_chat_template=lambda messages, add_generation_prompt, **_: write(messages, add_generation_prompt)
        )
    )


def plain(messages: list[dict[str, str]], prompt: bool, opening: str = "") -> str:
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>\n" for m in messages) + f"<|assistant|>{opening}" * prompt


def learned(made: Chat, messages: list[dict[str, str]] = TURNS) -> list[list[str]]:
    return [[p.text[start:end] for start, end in p.learned] for p in made.passages(messages)]


@pytest.mark.parametrize("opening", ["<think>\n", "\n<think>", "<thinking>"])
def test_an_answer_without_the_thought_that_the_prompt_begins_is_learned_from_its_first_word(opening: str) -> None:
    """DeepSeek-R1's and QwQ's templates put <think> before whatever the model writes, and into no turn of the data."""
    made = chat(lambda messages, prompt: plain(messages, prompt, opening.lstrip()))
    assert learned(made) == [["a cat<|end|>", "no<|end|>"]]
    assert (made.unopened, made.rewrites) == (1, 0)
    thoughtful = [TURNS[0], {"role": "assistant", "content": opening.lstrip() + "it is </think> a cat"}]
    assert learned(made, thoughtful) == [["it is </think> a cat<|end|>"]], "what the prompt has is not learned"
    assert made.unopened == 1


def test_a_template_that_speaks_otherwise_than_it_prompts_is_refused() -> None:
    with pytest.raises(BadRow, match="hides where an assistant turn begins"):
        chat(lambda messages, prompt: plain(messages, prompt, "Answer: <b> well")).passages(TURNS)


def test_only_a_later_turn_may_be_what_is_written_anew() -> None:
    """Here the second answer stands otherwise once a third one follows it; the first never changes."""

    def write(messages: list[dict[str, str]], prompt: bool) -> str:
        last = len(messages) - 1
        marked = [
            {**m, "content": f"({m['content']})" if i == last == 3 else m["content"]} for i, m in enumerate(messages)
        ]
        return plain(marked, prompt)

    made = chat(write)
    assert learned(made) == [["a cat<|end|>", "(no)<|end|>"]] and made.rewrites == 0
    assert learned(made, [*TURNS, *TURNS[2:]]) == [["a cat<|end|>"], ["(no)<|end|>"], ["no<|end|>"]]
    assert made.rewrites == 1
