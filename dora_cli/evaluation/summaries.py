"""Summaries that an encoder-decoder writes, and ROUGE: how much they share with what they should say."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from dora_cli.evaluation import ROUGE
from dora_cli.evaluation.generate import generate, search
from dora_cli.evaluation.scorers import TokenScorer


class Rouge:
    """The mean over rows of each F-measure, from 0 to 1, by Google's ``rouge-score`` with Porter's stemmer.

    Words are runs of a to z and digits, so other scripts have none. ``rougeLsum`` compares sentences, one a line;
    ``rougeL`` takes each text as a whole.

    Args:
        names: some of ``evaluation.ROUGE``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self.names, self.scorer = list(names), RougeScorer(list(names), use_stemmer=True)

    def mean(self, texts: Iterable[Sequence[str]]) -> dict[str, float]:
        """Of a prediction and its reference a row; a row without words in either counts 0."""
        rows = [self.scorer.score(reference, prediction) for prediction, reference in texts]
        return {name: sum(row[name].fmeasure for row in rows) / max(len(rows), 1) for name in self.names}


class SummaryScorer(TokenScorer):
    """Token metrics, and ROUGE of what the model writes for each document against the row's own summary, uncut."""

    written = ROUGE

    def __init__(self, task: Any, keep: bool) -> None:
        super().__init__(task, keep)
        self.rouge = Rouge([name for name in self.names if name in ROUGE]) if self.writes else None

    def _write(self, model: Any, batch: dict[str, Tensor], references: Sequence[Any]) -> None:
        task = self.task
        documents = [ids[real] for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)]
        written = generate(model, task.tokenizer, documents, task.config.max_new_tokens, search=search(task.config))
        said = task.tokenizer.batch_decode(written, skip_special_tokens=True)
        self.texts += zip((text.strip() for text in said), references, strict=True)

    def _written_metrics(self) -> dict[str, float]:
        return self.rouge.mean(self.texts) if self.rouge is not None else {}
