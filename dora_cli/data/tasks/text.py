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

# role → the names that its column is looked for under
TEXT = {"text": ["text"], "text_pair": ["text_pair"], "label": ["label"], "id": ["id", "idx"]}
ROLES = tuple(TEXT)


def find_columns(
    columns: Mapping[str, str | None],
    rows: Rows,
    roles: Mapping[str, Sequence[str]] = TEXT,
    *,
    needed: Sequence[str] = ("text", "label"),
) -> dict[str, str]:
    """Role → column, for the roles that the data has: those that are needed always, others where there is a column.

    Args:
        columns: what the user says, role → column. A role not named there is looked for under the names in ``roles``;
            one that is named but has no column (empty or null) is not used, whatever the recipe says.
        rows: the splits.
        roles: all that there are → the names of their columns.
        needed: those of them without which there is nothing to learn.

    Raises:
        UserError: an unknown role; a split without a column that is needed.
    """
    for role in columns:
        if role not in roles:
            raise UserError(f"unknown key 'data.columns.{role}'", hint=did_you_mean(role, roles))
    first = next(iter(rows.splits.values())).column_names
    found = {role: column for role, column in columns.items() if column}
    for role, names in roles.items():
        present = [name for name in names if name in first]
        if role not in found and (role in needed or (present and role not in columns)):
            found[role] = present[0] if present else names[0]
    for role, column in found.items():
        more = "" if role in needed else f", or use none: data.columns.{role}=null"
        check_column(rows, role, column, more)
    return found


def check_column(rows: Rows, role: str, column: str, more: str = "") -> None:
    """Refuse splits without this column.

    Args:
        more: what else can be done about it, for the hint.

    Raises:
        UserError: with the columns that there are.
    """
    for split, dataset in rows.splits.items():
        if column not in dataset.column_names:
            there = ", ".join(name for name in dataset.column_names if name != ROW)
            raise UserError(
                f"there is no column '{column}' for data.columns.{role}",
                where=f"{rows.origin.get(split) or f'split {split!r} of {rows.source}'} has: {there}",
                hint=f"say which it is with data.columns.{role}=NAME{more}",
            )


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
    rows = rows.with_format(None)  # columns of it are read when they are looked at
    texts, pairs = rows[columns["text"]], rows[columns["text_pair"]] if "text_pair" in columns else None
    cache = cache_folder(config.cache)
    encoded = tokenize(texts, pairs, tokenizer, max_length=config.max_length, scalars=scalars, cache=cache)
    encoded.ids = rows[columns.get("id", ROW)]
    return encoded


def values(dataset: Any, column: str) -> Iterator[Any]:
    """A column's values as Python objects, without holding them all."""
    for batch in dataset.select_columns([column]).iter(1000):
        yield from batch[column]
