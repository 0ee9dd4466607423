"""A budget under transformers' Trainer: sentiment.

    python scripts/quickstart_data.py data/quickstart
    python docs/examples/trainer.py --model MODEL --data data/quickstart --out adapter

MODEL is a hub name or a folder; DATA holds train.jsonl with "text" and "label".
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from dora_cli import DoraCallback, adapt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--out", default="adapter")
parser.add_argument("--checkpoints", default=tempfile.gettempdir() + "/trainer")
parser.add_argument("--epochs", type=float, default=2)
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --checkpoints")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
rows = load_dataset("json", data_files=str(args.data / "train.jsonl"), split="train").class_encode_column("label")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=96), remove_columns=["text"])

dora = adapt(model, method="dora", budget="r2")  # how many steps there are is for the Trainer to say
optimizer = torch.optim.AdamW(dora.parameter_groups(lr=2e-3))
trainer = Trainer(
    model,
    TrainingArguments(
        args.checkpoints,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        warmup_steps=0.06,
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
    ),
    train_dataset=rows,
    data_collator=DataCollatorWithPadding(tokenizer),
    optimizers=(optimizer, None),
    callbacks=[DoraCallback(dora)],
)
trainer.train(resume_from_checkpoint=args.resume)
dora.save(args.out)
print(f"{sum(dora.ranks().values())} components over {len(dora.ranks())} modules, saved in {args.out}")
