"""Token classification: a tag for every word, such as the names in a sentence or its parts of speech."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import ROW, Rows
from dora_cli.data.tasks import higher_is_better
from dora_cli.data.tasks.base import Loss, TaskChoice
from dora_cli.data.tasks.labels import as_text, class_names, distinct, in_order, positions
from dora_cli.data.tasks.text import find_columns, values
from dora_cli.data.token_rows import IGNORED
from dora_cli.data.tokens import check_room
from dora_cli.errors import UserError

COLUMNS = {"tokens": ["tokens", "words"], "tags": ["tags", "ner_tags"], "id": ["id", "idx"]}
CHUNK = 1000  # rows tokenised at once
OUTSIDE = "O"
# A tag of a word in an entity, in any of the ways to write them (IOB1, IOB2, BIOES, BILOU): where in it, and its kind.
TAG = re.compile(r"([BIESLUM])(?:[-_](.+))?", re.DOTALL)


class Ner:
    """A tag for each of a row's words (see ``Task``).

    The first token of a word carries its tag, its other tokens are read alone. The tags are ``config.labels``, else the
    names of a ``ClassLabel`` column, else the different tags of all splits. A batch holds ``labels`` beside the inputs,
    shape ``(n, s)``: numbers of tags, or ``IGNORED``.
    """

    name, kind = "ner", "tags"
    auto_class = "AutoModelForTokenClassification"
    peft_task_type = "TOKEN_CLS"

    def __init__(self, config: TaskChoice) -> None:
        self.config = config
        self.metric_names = list(config.metrics)
        self.columns: dict[str, str] = {}
        self.labels: list[str] = []
        self._positions: dict[str, int] = {}

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.metric_names[0])

    @property
    def has_entities(self) -> bool:
        """Whether the tags say where entities begin and end."""
        inside = [label for label in self.labels if label != OUTSIDE]
        return bool(inside) and all(map(TAG.fullmatch, inside))

    def fit(self, rows: Rows) -> None:
        self.columns = find_columns(self.config.columns, rows, COLUMNS, needed=("tokens", "tags"))
        found = _check_rows(rows, self.columns["tokens"], self.columns["tags"])
        names = [class_names(dataset, self.columns["tags"]) for dataset in rows.splits.values()]
        given = self.config.labels or next(filter(None, names), None)
        if given is None and rows.stream is not None:
            raise UserError(
                "the tags can't be read from data that is streamed",
                where=f"column '{self.columns['tags']}' of {rows.source}",
                hint="list them in data.labels, for example data.labels=[O,B-PER,I-PER]",
            )
        if given is None and len(found) < 2:
            raise UserError(
                f"every word has the same tag '{min(found)}'",
                where=f"column '{self.columns['tags']}' of {rows.source}",
                hint="choose the tags' column with data.columns.tags=NAME, or list all tags in data.labels",
            )
        self.labels = in_order(found) if given is None else distinct([str(label) for label in given])
        self._positions = positions(self.labels, numbered=given is not None)
        if given is not None:
            for (role, dataset), known in zip(rows.splits.items(), names, strict=True):
                for i, tags in enumerate(values(dataset, self.columns["tags"])):
                    if None in (numbers := self._numbers(tags, known)):
                        raise self._outside(tags[numbers.index(None)], rows.where(role, i))
        self._choose_metrics()

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }

    def encode(self, rows: Any, tokenizer: Any) -> Encoded:
        if not tokenizer.is_fast:
            raise UserError(
                f"its tokenizer ({type(tokenizer).__name__}) does not say which word a token comes from",
                hint="data.task=ner needs a model with a fast tokenizer, the kind that is kept in tokenizer.json",
            )
        check_room(tokenizer, self.config.max_length)
        pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "labels": IGNORED}
        pads = {name: pad for name, pad in pads.items() if name in (*tokenizer.model_input_names, "labels")}
        names = class_names(rows, self.columns["tags"])
        made: list[_Row] = []
        for chunk in rows.select_columns([self.columns["tokens"], self.columns["tags"]]).iter(CHUNK):
            sentences, tags = chunk[self.columns["tokens"]], chunk[self.columns["tags"]]
            numbers = (np.array(self._numbers(row, names)) for row in tags)
            made += _tagged(sentences, numbers, tokenizer, self.config.max_length)
        lost, unread = sum(row.lost for row in made), sum(row.unread for row in made)
        notes, most = [], self.config.max_length
        if lost:
            notes.append(f"{lost:,} words lost behind data.max_length={most} tokens: neither learned nor scored")
        if unread:
            notes.append(f"{unread:,} words of which the tokenizer makes nothing: read as its unknown token")
        return Encoded(
            ragged={name: torch.from_numpy(np.concatenate([row.columns[name] for row in made])) for name in pads},
            offsets=torch.tensor([0, *(len(row.columns["labels"]) for row in made)]).cumsum(0),
            scalars={},
            pads=pads,
            side=tokenizer.padding_side,
            ids=list(values(rows, self.columns.get("id", ROW))),
            truncated=sum(row.is_cut for row in made),
            notes=notes,
        )

    def facts(self) -> dict[str, str]:
        shown = ", ".join(self.labels[:20]) + (", …" if len(self.labels) > 20 else "")
        how = "entities (CoNLL) and words" if self.has_entities else "words: these tags mark no entities, as B-… do"
        return {"tags": f"{len(self.labels)}: {shown}", "scored": how}

    def count(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Loss:
        """``outputs``: the logits of every token, shape ``(n, s, tags)``, float32."""
        labels = batch["labels"]
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return Loss(total, (labels != IGNORED).sum(), logits)

    def decode(self, numbers: Sequence[int]) -> list[str]:
        """Tags as they are written into a file."""
        return [self.labels[i] for i in numbers]

    def _numbers(self, tags: Sequence[Any], names: Sequence[str] | None) -> list[int | None]:
        """The position of every tag in ``labels``, or ``None``."""
        found = [self._positions.get(as_text(tag, names) or "") for tag in tags]
        if names is None:
            return found
        return [self._positions.get(str(tag)) if i is None else i for i, tag in zip(found, tags, strict=True)]

    def _choose_metrics(self) -> None:
        entities = ("f1", "precision", "recall")
        if not self.has_entities and (asked := [name for name in self.metric_names if name in entities]):
            shown = ", ".join(self.labels[:5]) + (", …" if len(self.labels) > 5 else "")
            raise UserError(
                f"data.metrics: '{asked[0]}' counts entities, and these tags mark none: {shown}",
                hint="set data.metrics=[accuracy], or give tags such as B-PER and I-PER (data.labels, if these are "
                "their numbers)",
            )
        self.metric_names = self.metric_names or [*(entities if self.has_entities else ()), "accuracy"]

    def _outside(self, tag: Any, where: str) -> UserError:
        shown = ", ".join(self.labels[:10]) + (", …" if len(self.labels) > 10 else "")
        return UserError(
            f"tag '{tag}' is none of the tags ({shown})",
            where=where,
            hint="correct the row, or list all tags in data.labels",
        )


def _check_rows(rows: Rows, tokens: str, tags: str) -> set[str]:
    """Refuse a row whose words and tags are no lists of one length; the different tags of all others."""
    found: set[str] = set()
    for role, dataset in rows.splits.items():
        names = class_names(dataset, tags)
        for i, (words, given) in enumerate(zip(values(dataset, tokens), values(dataset, tags), strict=True)):
            texts = [as_text(tag, names) for tag in given] if isinstance(given, list) else []
            if problem := _problem(words, given, texts, tokens, tags):
                hint = "correct or remove the row"
                if isinstance(words, str) or isinstance(given, str):
                    hint += "; csv and tsv files hold no lists, use jsonl or parquet"
                raise UserError(problem, where=rows.where(role, i), hint=hint)
            found |= set(texts)  # type: ignore[arg-type]
    return found


def _problem(words: Any, given: Any, texts: list[str | None], tokens: str, tags: str) -> str | None:
    for column, value in ((tokens, words), (tags, given)):
        if value is None:
            return f"'{column}' is missing"
        if not isinstance(value, list):
            return f"'{column}' is no list, one entry a word ({type(value).__name__})"
    if not words:
        return f"'{tokens}' is empty"
    if len(words) != len(given):
        return f"{len(words)} entries in '{tokens}' and {len(given)} in '{tags}'"
    for i, (word, text) in enumerate(zip(words, texts, strict=True), start=1):
        if not isinstance(word, str):
            return f"word {i} of '{tokens}' is no text"
        if text is None:
            return f"tag {i} of '{tags}' is no word or number"
    return None


class _Row(NamedTuple):
    """``columns``: name → (s,), int32. ``lost``: words behind the end; ``unread``: words that make no token."""

    columns: dict[str, np.ndarray]
    lost: int
    unread: int
    is_cut: bool


def _tagged(
    sentences: Sequence[Sequence[str]], tags: Iterable[np.ndarray], tokenizer: Any, max_length: int
) -> Iterable[_Row]:
    """Token rows of sentences, whose words stand in a text as people write it, a space between them: so a tokenizer
    that joins a word to its space sees what it saw in pretraining, and what a pipeline will show it later."""
    unknown = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id)
    filler = next(i for i in unknown if i is not None)
    made = tokenizer([" ".join(words) for words in sentences], return_offsets_mapping=True, verbose=False)
    for encoding, words, numbers in zip(made.encodings, sentences, tags, strict=True):
        ends = np.cumsum([len(word) + 1 for word in words]) - 1  # of the words in the text, in characters
        columns = {
            "input_ids": np.array(encoding.ids, np.int32),
            "token_type_ids": np.array(encoding.type_ids, np.int32),
            "labels": np.full(len(encoding.ids), IGNORED, np.int32),
        }
        places = np.array([i for i, text in enumerate(encoding.sequence_ids) if text is not None], np.int64)
        last = np.array(encoding.offsets, np.int64).reshape(-1, 2)[places, 1] - 1  # each token's last character
        # A space counts to the word behind it.
        there, first = np.unique(np.searchsorted(ends, last, side="right").clip(max=len(words) - 1), return_index=True)
        columns["labels"][places[first]] = numbers[there]
        absent = np.setdiff1d(np.arange(len(words)), there)
        if len(absent):
            behind = places[-1] + 1 if len(places) else (len(encoding.ids) + 1) // 2
            at = np.append(places[first], behind)[np.searchsorted(there, absent)]
            fill: dict[str, Any] = {"input_ids": filler, "token_type_ids": 0, "labels": numbers[absent]}
            columns = {name: np.insert(column, at, fill[name]) for name, column in columns.items()}
            places = np.arange(behind - len(places), behind + len(absent))  # the text is one stretch
        surplus = max(len(columns["labels"]) - max_length, 0)
        cut = places[len(places) - surplus :]
        columns = {name: np.delete(column, cut) for name, column in columns.items()}
        kept = int((columns["labels"] != IGNORED).sum())
        yield _Row(columns, len(words) - kept, len(absent), surplus > 0)
