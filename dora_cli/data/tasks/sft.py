"""Instruction tuning: a model reads what was asked and learns what was answered."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import ROW, Rows
from dora_cli.data.tasks.causal import CausalTask
from dora_cli.data.tasks.conversations import (
    ALPACA,
    ALPACA_INPUT,
    ANSWER,
    ROLES,
    SHAPES,
    BadRow,
    Chat,
    Passage,
    check_template,
    conversation,
    filled,
    join,
    pieces,
)
from dora_cli.data.token_rows import TokenRows, encoded_rows
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean

CHUNK = 500  # rows tokenised at once


class Sft(CausalTask):
    """Loss on the assistant's tokens alone: the answer, or every assistant turn of a conversation, and the token that
    ends it.

    Rows hold ``messages`` (role and content; ShareGPT's from and value too), ``prompt`` and ``completion``, or
    ``instruction``, ``input`` and ``output``. What the model sees is ``data.template`` filled with the row's columns
    and then the answer; else, where the tokenizer has a chat template, that; else prompt and completion on two lines,
    and Alpaca's wording for instructions.
    """

    name = "sft"

    def fit(self, rows: Rows) -> None:
        first, self._rows = next(iter(rows.splits.values())), rows
        self.shape, self.columns = _shape(self.config.columns, [c for c in first.column_names if c != ROW], rows)
        if self.config.template is not None:
            if self.shape == "messages":
                raise UserError(
                    "data.template is for rows with a prompt, and these hold messages",
                    hint="set data.template=null: the tokenizer's chat template writes messages",
                )
            check_template(self.config.template, rows)
        for role, dataset in rows.splits.items():
            _require(dataset.column_names, self.columns, rows, role)
            for i, row in enumerate(dataset):
                try:
                    self._check(row)
                except BadRow as error:
                    column = self.columns[SHAPES[self.shape][0][0]]
                    raise UserError(
                        f"'{column}' {error}" if self.shape == "messages" else str(error),
                        where=rows.where(role, i),
                        hint="correct or remove the row",
                    ) from error

    def encode(self, rows: Any, tokenizer: Any) -> Encoded:
        self.tokenizer = tokenizer
        return encoded_rows(
            lambda: self._gather(rows, tokenizer),
            rows=rows,
            columns=[name for name in rows.column_names if name not in (ROW, self.columns.get("id"))],
            names=self.columns.get("id", ROW),
            tokenizer=tokenizer,
            max_length=self.config.max_length,
            settings={
                "task": self.name,
                "shape": self.shape,
                "columns": self.columns,
                "template": self.config.template,
                "chat": self._uses_chat(tokenizer),
            },
            cache=self.config.cache,
        )

    def _gather(self, rows: Any, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
        chat = Chat(tokenizer) if self._uses_chat(tokenizer) else None
        gathered = TokenRows(self.config.max_length)
        waiting: list[tuple[Passage, int]] = []
        for place, row in enumerate(rows):
            try:
                waiting += [(passage, place) for passage in self._passages(row, chat)]
            except BadRow as error:
                raise UserError(
                    f"its conversation {error}",
                    where=self._rows.where_in(rows, place),
                    hint="correct or remove the row, or choose a model whose chat template takes it",
                ) from error
            if len(waiting) >= CHUNK:
                _tokenize(waiting, tokenizer, gathered)
                waiting = []
                yield from gathered.full()
        _tokenize(waiting, tokenizer, gathered)
        if chat is not None:
            gathered.rewritten, gathered.unopened = chat.rewrites, chat.unopened
        yield gathered.block()

    def _uses_chat(self, tokenizer: Any) -> bool:
        there = bool(getattr(tokenizer, "chat_template", None))
        if self.shape == "messages" and not there:
            raise UserError(
                "these rows hold messages, and the tokenizer has no chat template to write them with",
                hint="choose an instruction-tuned model, or rows with prompt and completion",
            )
        return there and self.config.template is None

    def _check(self, row: Mapping[str, Any]) -> None:
        if self.shape == "messages":
            conversation(row[self.columns["messages"]])
            return
        for role in SHAPES[self.shape][0]:
            text = row[self.columns[role]]
            if not isinstance(text, str):
                raise BadRow(f"'{self.columns[role]}' {'is missing' if text is None else 'is no text'}")
        if not row[self.columns[ANSWER[self.shape]]].strip():
            raise BadRow(f"'{self.columns[ANSWER[self.shape]]}' is empty, so nothing could be learned from it")

    def _passages(self, row: Mapping[str, Any], chat: Chat | None) -> list[Passage]:
        if self.shape == "messages":
            assert chat is not None
            return chat.passages(conversation(row[self.columns["messages"]]))
        texts = {
            role: row[self.columns[role]] or ""
            for role in SHAPES[self.shape][0] + SHAPES[self.shape][1]
            if role in self.columns
        }
        answer = texts[ANSWER[self.shape]]
        if self.config.template is not None:
            return [join(filled(self.config.template, row), answer)]
        if self.shape == "prompt":
            asked, plain = texts["prompt"], texts["prompt"] + ("" if texts["prompt"].endswith("\n") else "\n")
        else:
            given = texts.get("input", "")
            asked = texts["instruction"] + (f"\n\n{given}" if given else "")
            plain = filled(ALPACA_INPUT if given else ALPACA, {"input": given, **texts})
        if chat is None:
            return [join(plain, answer)]
        return chat.passages([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])


def _shape(asked: Mapping[str, str | None], there: list[str], rows: Rows) -> tuple[str, dict[str, str]]:
    """The shape of the rows, and role → column."""
    for role in asked:
        if role not in ROLES:
            raise UserError(f"unknown key 'data.columns.{role}'", hint=did_you_mean(role, ROLES))
    named_roles = {role for role, column in asked.items() if column and role != "id"}
    for shape, (needed, further) in SHAPES.items():
        columns = {role: asked.get(role) or role for role in (*needed, *further, "id")}
        if named_roles <= {*needed, *further} and all(columns[role] in there for role in needed):
            # One that is named must be there; of the others those are taken that are, but for what is set to nothing.
            return shape, {r: c for r, c in columns.items() if asked.get(r) or (c in there and r not in asked)}
    named = {role: column for role, column in asked.items() if column and column not in there}
    role, column = next(iter(named.items()), ("messages", "messages"))
    raise UserError(
        f"there is no column '{column}' for data.columns.{role}",
        where=f"{rows.source} has: {', '.join(there)}",
        hint="rows need messages; prompt and completion; or instruction and output: name yours with "
        "data.columns.ROLE=NAME",
    )


def _require(there: list[str], columns: Mapping[str, str], rows: Rows, split: str) -> None:
    for role, column in columns.items():
        if column not in there:
            raise UserError(
                f"there is no column '{column}' for data.columns.{role}",
                where=f"{rows.origin.get(split) or f'split {split!r} of {rows.source}'} has: "
                + ", ".join(name for name in there if name != ROW),
                hint=f"say which it is with data.columns.{role}=NAME",
            )


def _tokenize(waiting: list[tuple[Passage, int]], tokenizer: Any, into: TokenRows) -> None:
    if not waiting:
        return
    passages = [passage for passage, _ in waiting]
    made = _by_offsets(passages, tokenizer) if tokenizer.is_fast else _by_pieces(passages, tokenizer)
    for (tokens, learned), (passage, place) in zip(made, waiting, strict=True):
        end = tokenizer.eos_token_id
        if passage.whole and end is not None and tokens[-1:] != [end]:
            tokens, learned = [*tokens, end], [*learned, True]
        into.add(tokens, learned, place)


def _by_offsets(passages: list[Passage], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens of whole texts: what is learned never changes how they are cut.

    A token with any part of an answer is learned: many tokenizers join a word to the space before it, which may be the
    prompt's last.
    """
    made = tokenizer(
        [passage.text for passage in passages],
        add_special_tokens=passages[0].whole,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for passage, tokens, offsets in zip(passages, made["input_ids"], made["offset_mapping"], strict=True):
        learned = [any(start < last and end > first for first, last in passage.learned) for start, end in offsets]
        # A tokenizer's own end token has no place in the text; it ends what is learned.
        if passage.whole and tokens[-1:] == [tokenizer.eos_token_id]:
            learned[-1] = True
        yield tokens, learned


def _by_pieces(passages: list[Passage], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """The same for tokenizers written in Python, which do not say where a token comes from."""
    for passage in passages:
        begin = [tokenizer.bos_token_id] if passage.whole and getattr(tokenizer, "add_bos_token", False) else []
        tokens, learned = list(begin), [False] * len(begin)
        for text, is_learned in pieces(passage):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            tokens += ids
            learned += [is_learned] * len(ids)
        yield tokens, learned
