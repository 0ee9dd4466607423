"""Names of labels: what a data set calls them, and what a row may say for one."""

from collections.abc import Iterable, Sequence
from typing import Any

from dora_cli.errors import UserError


def positions(labels: list[str], *, numbered: bool) -> dict[str, int]:
    """What a row may say → position of the label: its name; true and false in any spelling; a position as a number,
    where the labels have an order that somebody gave them (``numbered``) and none is itself a number."""
    found = {label.lower(): i for i, label in enumerate(labels) if label.lower() in ("true", "false")}
    if numbered and not any(map(is_integer, labels)):
        found |= {str(i): i for i in range(len(labels))}
    return found | {label: i for i, label in enumerate(labels)}


def as_text(value: Any, names: Sequence[str] | None) -> str | None:
    """A label as text: ``None`` for what can't be one."""
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int) or (isinstance(value, str) and value) else None


def is_integer(text: str) -> bool:
    return len(text) < 1000 and text.removeprefix("-").isdecimal()  # Python reads no number of thousands of digits


def class_names(dataset: Any, column: str) -> list[str] | None:
    """What ``datasets`` knows of the numbers of a column, or of those in its lists."""
    feature = dataset.features[column]
    return getattr(getattr(feature, "feature", feature), "names", None)


def distinct(labels: list[str]) -> list[str]:
    if len(set(labels)) < len(labels) or len(labels) < 2:
        raise UserError(
            f"data.labels={labels}: " + ("a label occurs twice" if len(labels) > 1 else "there must be at least two"),
            hint="list every label once; null reads them from the data",
        )
    return labels


def in_order(labels: Iterable[str]) -> list[str]:
    """Numbers in their order, then words by alphabet."""
    return sorted(labels, key=lambda text: (0, int(text), "") if is_integer(text) else (1, 0, text))
