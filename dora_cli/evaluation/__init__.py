"""Turns predictions into numbers. The tables name the metrics without importing them."""

_METRICS = "dora_cli.evaluation.metrics"

CLASSIFICATION = {
    name: f"{_METRICS}:{name}" for name in ("accuracy", "balanced_accuracy", "f1", "precision", "recall", "matthews")
}
REGRESSION = {name: f"{_METRICS}:{name}" for name in ("pearson", "spearman", "mse", "mae")}
METRICS = CLASSIFICATION | REGRESSION
TAGS = ("f1", "precision", "recall", "accuracy")  # of words: of the entities that they make, but for the last
TOKENS = ("perplexity", "token_accuracy")  # of language models, where the loss is measured
WRITTEN = ("exact_match",)  # of what they write by themselves, which takes much longer
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")  # of summaries that they write
# Of answers that stand in a text, as the official script of SQuAD 2.0 names them; the last two try every threshold.
SPANS = ("f1", "exact", "HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact", "best_f1", "best_exact")

# What a task's ``kind`` says about its outputs → what scores them.
SCORERS = {
    "labels": "dora_cli.evaluation.scorers:LabelScorer",
    "tags": "dora_cli.evaluation.tags:TagScorer",
    "tokens": "dora_cli.evaluation.scorers:TokenScorer",
    "summaries": "dora_cli.evaluation.summaries:SummaryScorer",
    "spans": "dora_cli.evaluation.spans:SpanScorer",
}
