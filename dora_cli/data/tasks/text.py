"""What the tasks on a text or a pair of texts share: finding columns, checking and reading rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dora_cli.data.cache import cache_folder
from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import ROW, Rows
from dora_cli.data.tasks.base import TaskChoice
from dora_cli.data.tokens import tokenize
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean

ROLES = ("text", "text_pair", "label", "id")


def find_columns(columns: Mapping[str, str | None], rows: Rows) -> dict[str, str]:
    """Role → column, for the roles that the data has: text and label always, text_pair and id where there is one.

    Args:
        columns: what the user says, role → column. A role not named there is looked for under its own name (``id`` also
            under ``idx``); one that is named but has no column (empty or null) is not used, whatever the recipe says.

    Raises:
        UserError: an unknown role; a split without a column that is needed.
    """
    for role in columns:
        if role not in ROLES:
            raise UserError(f"unknown key 'data.columns.{role}'", hint=did_you_mean(role, ROLES))
    first = next(iter(rows.splits.values())).column_names
    found = {role: column for role, column in columns.items() if column}
    for role, names in {"text": ["text"], "text_pair": ["text_pair"], "label": ["label"], "id": ["id", "idx"]}.items():
        present = [name for name in names if name in first]
        needed = role in ("text", "label")
        if role not in found and (needed or (present and role not in columns)):
            found[role] = present[0] if present else names[0]
    for split, dataset in rows.splits.items():
        there = [name for name in dataset.column_names if name != ROW]
        for role, column in found.items():
            if column not in there:
                raise UserError(
                    f"there is no column '{column}' for data.columns.{role}",
                    where=f"{rows.origin.get(split) or f'split {split!r} of {rows.source}'} has: {', '.join(there)}",
                    hint=f"say which it is with data.columns.{role}=NAME"
                    + (f", or use none: data.columns.{role}=null" if role in ("text_pair", "id") else ""),
                )
    return found


def check_texts(rows: Rows, role: str, columns: Sequence[str]) -> None:
    """Refuse a row of a split whose text is missing or no text.

    Raises:
        UserError: with file and line.
    """
    for column in columns:
        for i, text in enumerate(values(rows.splits[role], column)):
            if not isinstance(text, str):
                what = "is missing" if text is None else f"is no text ({type(text).__name__})"
                raise UserError(f"'{column}' {what}", where=rows.where(role, i), hint="correct or remove the row")


def encode_texts(
    rows: Any, columns: dict[str, str], tokenizer: Any, config: TaskChoice, *, scalars: dict[str, Tensor]
) -> Encoded:
    """Tokenise a split's text, or its pairs, and name its rows by their id, else by their number in the source."""
    texts = list(values(rows, columns["text"]))
    pairs = list(values(rows, columns["text_pair"])) if "text_pair" in columns else None
    cache = cache_folder(config.cache)
    encoded = tokenize(texts, pairs, tokenizer, max_length=config.max_length, scalars=scalars, cache=cache)
    encoded.ids = list(values(rows, columns.get("id", ROW)))
    return encoded


def values(dataset: Any, column: str) -> Iterator[Any]:
    """A column's values as Python objects, without holding them all."""
    for batch in dataset.select_columns([column]).iter(1000):
        yield from batch[column]
