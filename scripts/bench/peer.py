"""The other side of run.py: PEFT's AdaLoRA in transformers' Trainer, a whole run in a process of its own.

run.py starts it and gives every setting. Written as a user of both libraries would write it who wants it fast: fused
AdamW, padding to the longest row of a batch and no further, no progress bar, no reports, no pinned memory and no extra
processes where there is no GPU, loss not checked for NaN. What a comparison needs is added: the rows come in the order
of dora-train's plan (grouped by length like Trainer's own ``group_by_length``, and the longest batch first), validation
rows from long to short, so that both sides pad the same batches; and the held-out loss is the mean cross-entropy,
whereas the model's own contains AdaLoRA's penalty. Adapters sit on the same modules as dora-train's. The last
checkpoint is the result.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import load_dataset
from peft import AdaLoraConfig, get_peft_model
from torch.utils.data import Sampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dora_cli.data.batching import LengthGroupedBatches
from dora_cli.models.targets import find_targets

# As the official scripts of AdaLoRA and as recipes/method/adalora.yaml have them.
ALPHA, ORTHOGONAL, START, END, INTERVAL = 32, 0.1, 0.15, 0.5, 10


def build(options: argparse.Namespace) -> Trainer:
    """Rows, model and Trainer, ready to train."""
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = load_dataset("json", data_files={s: f"{options.data}/{s}.jsonl" for s in ("train", "validation")})

    def tokenise(rows: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(rows["text"], truncation=True, max_length=options.max_length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    data = data.map(tokenise, batched=True, remove_columns=["text"])
    plan = LengthGroupedBatches(torch.tensor(data["train"]["length"]), options.batch, options.seed)
    steps = options.epochs * len(plan)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(set(data["train"]["label"])), dtype=torch.float32
    )
    return GivenOrder(
        plan=plan,
        model=adapted(model, steps, options),
        args=arguments(steps, options),
        train_dataset=data["train"],
        eval_dataset=data["validation"].sort("length", reverse=True).flatten_indices(),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=held_out,
        callbacks=[Allocate()],
    )


def adapted(model: Any, steps: int, options: argparse.Namespace) -> Any:
    """AdaLoRA from 1.5 times the average rank asked for down to it, between the same steps as dora-train."""
    config = AdaLoraConfig(
        task_type="SEQ_CLS",  # the classifier is trained in full
        target_modules=find_targets(model, None, exclude=[]),
        init_r=math.ceil(1.5 * options.rank),
        target_r=options.rank,
        lora_alpha=ALPHA,
        lora_dropout=options.dropout,
        orth_reg_weight=ORTHOGONAL,
        total_step=steps,
        tinit=int(START * steps),
        tfinal=steps - int(END * steps),
        deltaT=INTERVAL,
    )
    return get_peft_model(model, config)


def arguments(steps: int, options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=options.out,
        seed=options.seed,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.eval_batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(options.warmup * steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip_norm,
        bf16=options.precision == "bf16",
        optim="adamw_torch_fused",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        dataloader_pin_memory=options.device == "cuda",
        use_cpu=options.device == "cpu",
        disable_tqdm=True,
        report_to="none",
    )


class GivenOrder(Trainer):
    """A Trainer that takes the rows of each epoch in a plan's order."""

    def __init__(self, plan: LengthGroupedBatches, **settings: Any) -> None:
        super().__init__(**settings)
        self.plan = plan

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return PlanSampler(self.plan)


class PlanSampler(Sampler[int]):
    """The rows of a plan's batches end to end; every pass is the next epoch. All batches must be full."""

    def __init__(self, plan: LengthGroupedBatches) -> None:
        self.plan, self.passes = plan, 0

    def __len__(self) -> int:
        return len(self.plan.lengths)

    def __iter__(self) -> Iterator[int]:
        batches = self.plan.epoch(self.passes)
        self.passes += 1
        return (row for batch in batches for row in batch)


class Allocate(TrainerCallback):
    """Where PEFT's documentation calls it: after the optimizer's step, before the gradients are cleared."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


def held_out(prediction: EvalPrediction) -> dict[str, float]:
    """Mean cross-entropy over the rows, and accuracy."""
    logits, labels = torch.from_numpy(prediction.predictions).float(), torch.from_numpy(prediction.label_ids)
    accuracy = (logits.argmax(dim=-1) == labels).float().mean()
    return {"cross_entropy": F.cross_entropy(logits, labels).item(), "accuracy": accuracy.item()}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("seed", "epochs", "batch", "eval_batch", "max_length", "rank", "log_every"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, required=True)
    for name in ("learning_rate", "warmup", "weight_decay", "clip_norm", "dropout"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    trainer = build(options)
    trainer.train()
    history = trainer.state.log_history
    last = next(record for record in reversed(history) if "eval_cross_entropy" in record)
    result = {
        "steps": trainer.state.global_step,
        "seconds": history[-1]["train_runtime"],
        "loss": last["eval_cross_entropy"],
        "accuracy": last["eval_accuracy"],
        "checkpoint": f"checkpoint-{trainer.state.global_step}",
    }
    Path(options.out, "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
