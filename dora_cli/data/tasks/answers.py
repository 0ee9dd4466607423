"""A question's answers in the shapes that people have them, and where in the context the one to learn stands."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dora_cli.data.tasks.conversations import BadRow

SHOWN = 40  # characters of an answer in a message


class Answers(NamedTuple):
    """What a row says of its answers.

    Attributes:
        texts: all that count as right; empty where the context holds no answer.
        span: characters [start, end) of the answer to learn, spaces around it left out; ``None`` without an answer.
        guessed: the row does not say where that answer stands, and its text occurs several times: the first is taken.
    """

    texts: list[str]
    span: tuple[int, int] | None
    guessed: bool = False


def read_answers(value: Any, start: Any, context: str) -> Answers:
    """The answers of a row. Learned is the first, or where none has a start the first whose text is in the context.

    Args:
        value: ``{"text": […], "answer_start": […]}`` as in SQuAD (or a list of such objects with one text each); a
            text; a list of texts. Nothing in it but blanks, as an empty field of a csv file, means that there is no
            answer.
        start: of the text or texts where ``value`` does not say so, in characters from 0; ``None`` or empty: search.
        context: where they are to be found.

    Raises:
        BadRow: the answers are missing, of another shape, or not where they are said to be.
    """
    pairs = _pairs(value, start)
    if not any(text.strip() for text, _ in pairs):
        return Answers([], None)
    for text, at in pairs:
        if not text.strip():
            raise BadRow("hold an empty text beside others")
        if at is not None and (at < 0 or not context.startswith(text, at)):
            raise BadRow(f"say '{_short(text)}' at character {at} of the context, {_instead(text, context)}")
    texts = [text for text, _ in pairs]
    text, at = next(((t, a) for t, a in pairs if a is not None), (texts[0], None))
    if at is not None:
        return Answers(texts, _trimmed(text, at))
    text = next((t for t in texts if t in context), text)
    if text not in context:
        raise BadRow(f"say '{_short(text)}', which is not in the context")
    at = context.index(text)
    return Answers(texts, _trimmed(text, at), guessed=text in context[at + 1 :])


def _pairs(value: Any, start: Any) -> list[tuple[str, int | None]]:
    """Every text with its start, or ``None`` where there is none."""
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
    elif isinstance(value, list) and value and all(isinstance(answer, Mapping) for answer in value):
        texts, starts = ([answer.get(key) for answer in value] for key in ("text", "answer_start"))
    else:
        texts, starts = value, start
    if texts is None:
        raise BadRow("are missing (a question without an answer has an empty list)")
    if isinstance(texts, str):
        texts, starts = [texts], starts if isinstance(starts, list) else [starts]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRow("are no text, no list of texts and no {text: […], answer_start: […]}")
    starts = starts if isinstance(starts, list) else [None] * len(texts) if starts in (None, "") else [starts]
    if len(starts) != len(texts):
        raise BadRow(f"are {len(texts)} texts with {len(starts)} starts")
    return [(text, _start(at)) for text, at in zip(texts, starts, strict=True)]


def _start(value: Any) -> int | None:
    """A start as a number, also where it is written as text, as csv gives it."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRow(f"start at '{value}', which is no whole number") from error


def _trimmed(text: str, start: int) -> tuple[int, int]:
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def _instead(text: str, context: str) -> str:
    at = context.find(text)
    return "where it is not" if at < 0 else f"but it stands at {at} (characters count from 0)"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
