"""Rows as people have them (messages, prompt and completion, instruction and output) made into one: a conversation."""

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_cli.data.sources import ROW, Rows
from dora_cli.errors import UserError

Message = dict[str, str]  # role, content

OPENED = re.compile(r"<\w+>\s*\Z")  # a thought that some templates begin for the model (DeepSeek-R1, QwQ): <think>

# Which columns a row may have; the first shape of which the needed ones are there is taken.
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "prompt": (("prompt", "completion"), ()),
    "instruction": (("instruction", "output"), ("input",)),
}
ROLES = (*(role for needed, further in SHAPES.values() for role in (*needed, *further)), "id")
ANSWER = {"prompt": "completion", "instruction": "output"}  # shape → the role whose text is learned

# Names that other collections use (ShareGPT's among them).
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
}

ALPACA = (  # the wording that Alpaca's authors trained on, for models without a chat template
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


TODAY = "26 Jul 2024"  # where a template writes the day (Llama 3 does): the one it falls back to, so that runs repeat


@dataclass(frozen=True)
class Passage:
    """A text, and the stretches of it that are learned, as (start, end) of characters.

    ``whole``: it still needs the tokenizer's beginning and end (a chat template writes its own).
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    whole: bool = True


class BadRow(ValueError):
    """What is wrong with a row, in words; whoever knows its place makes a message of it."""


def conversation(value: Any) -> list[Message]:
    """The messages of a ``messages`` column, checked.

    Raises:
        BadRow: it is no list of messages with a known role and a text, has no assistant turn, begins with one or has
            one that says nothing.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow("is no list of messages")
    messages = [_message(item, i) for i, item in enumerate(value, start=1)]
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow("has no assistant turn, so nothing could be learned from it")
    if messages[0]["role"] == "assistant":
        raise BadRow("begins with the assistant")
    silent = [i for i, m in enumerate(messages, start=1) if m["role"] == "assistant" and not m["content"].strip()]
    if silent:
        raise BadRow(f"has an assistant turn that says nothing (message {silent[0]})")
    return messages


def _message(item: Any, number: int) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow(f"has a message {number} that is no object with 'role' and 'content'")
    role, content = (
        item.get(a) if item.get(a) is not None else item.get(b) for a, b in (("role", "from"), ("content", "value"))
    )
    if not isinstance(role, str) or role not in SPEAKERS:
        raise BadRow(
            f"has a message {number} of unknown role {role!r} (known: {', '.join(sorted(set(SPEAKERS.values())))})"
        )
    if item.get("tool_calls"):
        raise BadRow(f"has a message {number} with tool calls, which are not supported yet")
    if not isinstance(content, str):
        raise BadRow(f"has a message {number} whose content is no text")
    return {"role": SPEAKERS[role], "content": content}


class Chat:
    """A tokenizer's own chat template, and what it says of who speaks where.

    A template that writes earlier turns anew as a conversation goes on (Qwen3 takes thoughts out of them) gives a
    passage for every assistant turn, of which the last turn is learned; any other gives one passage.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.rewrites = 0  # conversations that became several passages
        self.unopened = 0  # conversations with a turn that lacks the thought which the template begins for the model

    def passages(self, messages: list[Message]) -> list[Passage]:
        """
        Raises:
            BadRow: the template refuses the conversation, or does not say where the assistant's words begin.
        """
        full = self._text(messages)
        turns: list[tuple[str, int]] = []  # the conversation up to a turn of the assistant, and where that turn begins
        unopened = False
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = self._text(messages[:i], prompt=True), self._text(messages[: i + 1])
                if not after.startswith(before):
                    before, unopened = OPENED.sub("", before), True
                if not after.startswith(before):
                    raise BadRow("is rendered by the chat template in a way that hides where an assistant turn begins")
                turns.append((after, len(before)))
        self.unopened += unopened
        if all(full.startswith(after) for after, _ in turns):
            return [Passage(full, tuple((start, len(after.rstrip())) for after, start in turns), whole=False)]
        self.rewrites += 1
        return [Passage(after, ((start, len(after.rstrip())),), whole=False) for after, start in turns]

    def _text(self, messages: list[Message], *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, date_string=TODAY
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise BadRow(f"is refused by the tokenizer's chat template: {error}") from error
        return str(text)


def check_template(template: str, rows: Rows) -> None:
    """Refuse a ``data.template`` that is malformed, or names a column that some split does not have.

    Raises:
        UserError: with the columns that there are.
    """
    try:
        fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(
            f"data.template is malformed: {error}", hint="write {column}, and {{ or }} for a brace"
        ) from error
    for split, dataset in rows.splits.items():
        columns = [column for column in dataset.column_names if column != ROW]
        for name, spec, how in fields:
            if name not in columns or spec or how:
                raise UserError(
                    f"data.template names '{{{name}}}', and there is no such column",
                    where=f"{rows.origin.get(split) or f'split {split!r} of {rows.source}'} has: {', '.join(columns)}",
                    hint="write {column}, and {{ or }} for a brace",
                )


def filled(template: str, row: Mapping[str, Any]) -> str:
    """A checked template with a row's columns; nothing for what is missing."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append("" if row[name] is None else str(row[name]))
    return "".join(parts)


def join(prompt: str, answer: str) -> Passage:
    """A prompt that is read and an answer that is learned."""
    return Passage(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))


def pieces(passage: Passage) -> Iterator[tuple[str, bool]]:
    """The text in stretches, each learned or not."""
    at = 0
    for start, end in passage.learned:
        yield passage.text[at:start], False
        yield passage.text[start:end], True
        at = end
    yield passage.text[at:], False
