"""The typed truth of every key. YAML is the user's language; these dataclasses are what it is checked against.

A field's ``help`` is shown by ``--help`` and in the docs, ``low`` / ``high`` / ``choices`` are its range.
The five part groups (adapter, importance, schedule, allocator, regularizer) are not written here:
their keys are the dataclass fields of the parts themselves (see ``part_schema``), so that a new part brings its
options along in its own file.
"""

from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

MISSING: Any = "???"  # omegaconf.MISSING; importing it for this alone would cost ``--help`` a tenth of a second

PART_GROUPS = ("adapter", "importance", "schedule", "allocator", "regularizer")


def key(default: Any, help: str, **meta: Any) -> Any:
    """A dataclass field with its help text and its range (``low``, ``high``: inclusive; ``above``, ``below``: strict;
    ``choices``)."""
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata={"help": help, **meta})
    return field(default=default, metadata={"help": help, **meta})


@dataclass
class ModelConfig:
    name: str = key(MISSING, "hub name, local folder, or package://NAME/SUBFOLDER")
    revision: str | None = key(None, "branch, tag or commit on the hub")
    trust_remote_code: bool = key(False, "run Python code that comes with the model")
    quantization: str | None = key(
        None,
        "how the frozen base is packed: bnb_nf4, bnb_int8, ao_int8; null: as it is stored",
        choices=("bnb_nf4", "bnb_int8", "ao_int8"),
    )
    add_tokens: list[str] = key([], 'special tokens to add, e.g. ["<|im_start|>"]; their embeddings are trained')


@dataclass
class DataConfig:
    task: str = key(
        "classification",
        "kind of task: classification, regression, ner, multiple_choice, qa, sft, clm or summarization",
    )
    name: str | None = key(None, "data set on the hub")
    config: str | None = key(None, "configuration of the hub data set, e.g. sst2 of glue")
    path: str | None = key(None, "file or folder (jsonl, json, csv, tsv, parquet, save_to_disk); beats data.name")
    splits: dict[str, str | None] = key(
        {}, "role → split or file, e.g. validation: dev; further roles are evaluated too"
    )
    columns: dict[str, str | None] = key({}, "role → column, e.g. text: sentence; null: not used")
    template: str | None = key(
        None,
        "the prompt of an sft row, e.g. 'Question: {question}\nAnswer: ', or what is summarised, e.g. "
        "'summarize: {document}'; null: see docs",
    )
    labels: list[str] | None = key(None, "the labels (of ner the tags) in order; null reads them from the data")
    metrics: list[str] = key([], "metrics to report; the first chooses the best checkpoint; empty: the task's own")
    max_length: int = key(128, "longest input in tokens", low=1)
    max_target_length: int | None = key(
        None, "of summarization: longest summary that is learned, in tokens; null: data.max_length", low=1
    )
    answer: str | None = key(
        None, "regular expression for what counts of an answer that is written (exact_match); null: all of it"
    )
    max_new_tokens: int = key(256, "longest answer that is written, in tokens", low=1)
    num_beams: int | None = key(None, "of sft and summarization: beams of the search when writing; null: 1", low=1)
    length_penalty: float | None = key(
        None, "of sft and summarization, with beams: above 0 favours long texts, below 0 short ones; null: 1"
    )
    no_repeat_ngram_size: int | None = key(
        None, "of summarization: no run of so many tokens is written twice; null: any may be", low=1
    )
    doc_stride: int | None = key(
        None, "of qa: tokens that neighbouring windows of a long context share; null: a third of data.max_length", low=0
    )
    max_answer_length: int | None = key(None, "of qa: longest answer to predict, in tokens; null: 30", low=1)
    null_answers: bool | None = key(
        None, "of qa: whether a context may hold no answer; null: whether some row has none"
    )
    packing: bool = key(False, "of sft and clm: fill training rows with several documents, which do not see each other")
    max_train_samples: int | None = key(None, "use only the first N training rows after a seeded shuffle", low=1)
    max_eval_samples: int | None = key(None, "use only the first N rows of each evaluation split", low=1)
    cache: str | None = key(
        "auto", "folder that keeps tokens, and rows of large files, for later runs; auto: ~/.cache/dora_cli; null: none"
    )
    streaming: bool = key(False, "read training rows in order, a buffer at a time, and keep nothing of them")
    shuffle_buffer: int | None = key(
        None, "rows of a streamed set that are read at once and shuffled together; null: 10,000", low=1
    )
    holdout: float = key(0.1, "share of train held out where there is no validation split", above=0.0, below=1.0)


@dataclass
class TrainConfig:
    epochs: float = key(3.0, "passes over the training data", above=0.0)
    max_steps: int | None = key(None, "optimizer steps; beats train.epochs", low=1)
    batch_size: int = key(16, "rows per micro-batch, of all processes together", low=1)
    eval_batch_size: int = key(64, "rows per evaluation batch of a process", low=1)
    accumulation: int = key(1, "micro-batches per optimizer step", low=1)
    learning_rate: float = key(1e-3, "peak learning rate of the adapter", above=0.0)
    head_learning_rate: float | None = key(None, "peak learning rate of the head; null: the adapter's", above=0.0)
    scheduler: str = key("linear", "decay of the learning rate", choices=("linear", "cosine", "constant"))
    weight_decay: float = key(0.01, "AdamW's decoupled weight decay", low=0.0)
    warmup: float | int = key(0.06, "learning-rate warm-up: a share of the run below 1, or steps", low=0)
    clip_norm: float | None = key(1.0, "largest gradient norm; null: no clipping", above=0.0)
    precision: str = key("fp32", "of the forward pass, and of the frozen base", choices=("fp32", "bf16"))
    device: str = key("auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    eval_every: int | float | None = key(None, "steps, or a share of the run below 1; null: every epoch", above=0)
    log_every: int = key(10, "optimizer steps between log lines", low=1)
    save_every: int | float | None = key(None, "steps, or a share of the run below 1; null: every epoch", above=0)
    keep_last: int = key(2, "checkpoints to keep", low=1)
    max_skipped: int = key(10, "steps to skip whose loss or gradient is not finite, before the run stops", low=0)
    patience: int | None = key(None, "stop after this many evaluations without a better metric; null: never", low=1)
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass to save memory")
    compile: bool = key(False, "torch.compile the model")
    shard: str = key(
        "auto",
        "of several processes, whether each holds a part of the frozen base; auto: where it takes half a GPU's memory",
        choices=("auto", "none", "full"),
    )
    timeout: float = key(600.0, "seconds that a process waits for the others", above=0.0)
    base: str = key(
        "here",
        "where the frozen base is: here, or apart, in the second of two processes that torchrun starts",
        choices=("here", "apart"),
    )
    workers: int = key(
        0, "processes that pad batches; 0 is fastest: padding takes 0.2 ms, handing over from a process 2 ms", low=0
    )


@dataclass
class SaveConfig:
    merged: bool = key(False, "also write the merged model")
    report: bool = key(True, "write report.html when the run ends")
    which: str = key("best", "the evaluation whose weights are exported", choices=("best", "last"))


@dataclass
class HubConfig:
    private: bool | None = key(None, "whether a new repository is private; null: as the account has it")


@dataclass
class TrackConfig:
    to: Any = key(None, "other tools that follow the run: tensorboard, wandb, mlflow, trackio; one, or a list")
    project: str = key("dora_cli", "what they file runs under (an MLflow experiment; TensorBoard has none)")
    name: str | None = key(None, "what they call the run; null: as its folder is called")


@dataclass
class Config:
    budget: Any = key(None, "what is left at the end: a share (0.1), parameters (340k), an average rank (r4)")
    seed: int = key(1, "seed of everything random", low=0, high=2**32 - 1)
    out: str | None = key(None, "run folder; null: runs/RECIPE/METHOD-bBUDGET-sSEED")
    resume: bool = key(False, "go on from the newest whole checkpoint in out")
    overwrite: bool = key(False, "replace a finished run in out")
    dry_run: bool | str = key(
        False, "print the plan, as text or as JSON, and train nothing", choices=(False, True, "json")
    )
    offline: bool = key(False, "never reach for the network")
    export: str = key("exact", "adapter layout: exact ranks per module, or one for all", choices=("exact", "uniform"))
    push_to_hub: str | None = key(None, "repository on the hub to upload the adapter to, when all is saved")
    hub: HubConfig = field(default_factory=HubConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


def part_schema(group: str, parts: Mapping[str, type]) -> type:
    """The dataclass of one part group: ``name`` and the union of its parts' options, all null by default.

    Null means "the part's own default", which stands with the part's class. Options whose types differ between
    parts are typed ``Any`` here and checked by the part that is chosen.
    """
    options: dict[str, Any] = {}
    for part in parts.values():
        hints = get_type_hints(part)
        for option in fields(part):
            hint = hints[option.name]
            options[option.name] = hint if options.get(option.name, hint) == hint else Any
    return make_dataclass(
        f"{group.capitalize()}Config",
        [("name", str, field(default=MISSING))] + [(o, t | None, field(default=None)) for o, t in options.items()],
    )


def part_defaults(part: type) -> dict[str, Any]:
    """Every option of a part with its own default."""
    return {f.name: f.default_factory() if f.default_factory is not NO_DEFAULT else f.default for f in fields(part)}
