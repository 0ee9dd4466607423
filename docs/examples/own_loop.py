"""A training loop of one's own, under a budget: sentiment, in plain PyTorch.

    python scripts/quickstart_data.py data/quickstart
    python docs/examples/own_loop.py --model MODEL --data data/quickstart --out adapter

MODEL is a hub name or a folder; DATA holds train.jsonl with "text" and "label".
"""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dora_cli import adapt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--out", default="adapter")
parser.add_argument("--epochs", type=int, default=2)
args = parser.parse_args()

torch.manual_seed(1)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
rows = [json.loads(line) for line in (args.data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
numbers = {label: i for i, label in enumerate(sorted({row["label"] for row in rows}))}


def batch(rows):
    encoded = tokenizer(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=96, return_tensors="pt"
    )
    return {**encoded, "labels": torch.tensor([numbers[row["label"]] for row in rows])}


loader = DataLoader(rows, batch_size=32, shuffle=True, collate_fn=batch)

# The ten lines.
dora = adapt(model, method="dora", budget="r2", total_steps=len(loader) * args.epochs)
optimizer = torch.optim.AdamW(dora.parameter_groups(lr=2e-3))
model.train()
for _ in range(args.epochs):
    for inputs in loader:
        loss = model(**inputs).loss
        loss.backward()
        dora.after_backward()  # the regularizer's gradient, before clipping
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        event = dora.after_step(optimizer)  # scores, and allocates where it is time
        optimizer.zero_grad()
        if event:
            print(f"step {event['step']}  alive {event['alive']}  loss {loss.item():.3f}")
dora.save(args.out)
print(f"{sum(dora.ranks().values())} components over {len(dora.ranks())} modules, saved in {args.out}")
