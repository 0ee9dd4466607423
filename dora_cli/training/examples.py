"""Two rows as the model will see them, for the plan: every token, and in brackets what is learned."""

from typing import Any, cast

from torch import Tensor

from dora_cli.training.setup import Session

MOST = 400  # tokens of a row that are shown


def examples(session: Session) -> dict[str, str]:
    """Name → text, several lines: the tokens of a row, what is learned of it, and its other columns."""
    encoded = session.encoded["train"]
    numbers = list(range(min(2, len(encoded))))
    if encoded.windows_of is not None:  # one with its answer, one without
        none = encoded.scalars["end"] == encoded.scalars["null"]
        numbers = sorted(int(kind.nonzero()[0]) for kind in (none, ~none) if kind.any())
    first = 0 if session.stream is None else session.stream.source.first
    lines: dict[str, str] = {}
    for number in numbers:
        name = f"row {first + encoded.place(number) + 1}"
        name = f"{name} ({number + 1})" if name in lines else name  # another window, or turn, of it
        lines[name] = _window(session, number) if encoded.windows_of is not None else _row(session, number)
        if encoded.target is not None:
            words = _tokens(session, encoded.target[number]["labels"])
            text = _shortened([f"[{word}]" for word in words], MOST)
            lines[f"→ {name}"] = f"{len(words):,} tokens, learned (in brackets)\n{text}"
    return lines


def _row(session: Session, number: int) -> str:
    encoded, task = session.encoded["train"], cast(Any, session.task)
    example = encoded[number]
    words = _tokens(session, example["input_ids"])
    facts = [f"{len(words):,} tokens"]
    if "labels" in encoded.ragged:
        labels = example["labels"].tolist()
        tags = task.labels if task.kind == "tags" else None  # else a token is its own label
        facts[0] += f", {sum(label >= 0 for label in labels):,} learned (in brackets)"
        words = [_marked(word, label, tags) for word, label in zip(words, labels, strict=True)]
    facts += [f"{name} {example[name].tolist()}" for name in encoded.scalars]
    parts = encoded.parts(number)
    return "\n".join(["; ".join(facts), *(_shortened(words[part], MOST // len(parts)) for part in parts)])


def _window(session: Session, number: int) -> str:
    """A window with its answer in brackets, or with the position that stands for none."""
    example = session.encoded["train"][number]
    start, end, null = (int(example[name]) for name in ("start", "end", "null"))
    words = _tokens(session, example["input_ids"])
    words[start] = f"[{words[start]}"
    words[end] += "]"
    what = "no answer in it: what stands for none" if end == null else "the answer"
    return f"{len(words):,} tokens; {what} in brackets\n{_shortened(words, MOST)}"


def _tokens(session: Session, ids: Tensor) -> list[str]:
    words: list[str] = session.tokenizer.convert_ids_to_tokens(ids.tolist())
    return words


def _marked(word: str, label: int, tags: list[str] | None) -> str:
    """A token, in brackets where it is learned, with its tag where tags are what is learned."""
    if label < 0:
        return word
    return f"[{word}]" if tags is None else f"[{word} {tags[label]}]"


def _shortened(words: list[str], most: int) -> str:
    return " ".join(words[:most]) + (f" … and {len(words) - most:,} more" if len(words) > most else "")
