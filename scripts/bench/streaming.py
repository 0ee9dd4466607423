"""Memory of runs on a set that is larger than the memory they are given.

    python scripts/bench/streaming.py --folder DIR [--gib 2] [--limit 600] [--steps 300] [--cases NAME …]

Writes a set of made-up texts into DIR (kept: delete it afterwards, also DIR/cache, which takes about three times as
much) and trains a tiny decoder on it through the real command: `mapped` reads, tokenises and maps it, `again` finds the
tokens of `mapped`, `streamed` streams it; `pass` reads, tokenises and batches all of it as a stream, without a model,
since training on all of it would take hours. What counts is memory that can't be given back, RssAnon of
/proc/PID/status. Pages of mapped files (RssFile) stand beside it; the system takes those back when it likes. A run with
more than --limit MiB is ended.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SYLLABLES = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "ou") for c in "lmnrst"]
WORDS = [first + second for first in SYLLABLES[::4] for second in SYLLABLES[::5]]  # of six to eight characters
CASES: dict[str, list[str]] = {
    "mapped": [],
    "again": [],
    "streamed": ["data.streaming=true", "data.shuffle_buffer=1000"],
    "pass": [],
}


def write_set(path: Path, size: int) -> None:
    """Lines of about a thousand characters, until they have ``size`` bytes."""
    draw, written = random.Random(0), 0
    parts = [" ".join(draw.choices(WORDS, k=50)) for _ in range(2000)]
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            written += file.write(json.dumps({"text": " ".join(draw.choices(parts, k=draw.randint(1, 7)))}) + "\n")


def write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    rust = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=rust, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)


def memory(pid: int) -> dict[str, int]:
    """MiB of a process by kind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("Rss", "VmData"))}
    return {name: int(value) >> 10 for name, value in found.items()}


def watched(command: list[str], limit: int, environment: dict[str, str]) -> None:
    """Run a command and print its memory over time."""
    begin, taken = time.perf_counter(), []
    with subprocess.Popen([sys.executable, *command], env=environment) as process:
        while process.poll() is None:
            try:
                found = memory(process.pid)
            except OSError:  # it has just ended
                break
            if "RssAnon" in found:
                taken.append((time.perf_counter() - begin, found))
                if found["RssAnon"] > limit:
                    process.kill()
                    print(f"  ended: more than {limit} MiB")
            time.sleep(0.1)
    seconds = time.perf_counter() - begin
    print(f"  {seconds:.0f} s, exit code {process.returncode}")
    for i in range(10):
        part = [found for t, found in taken if i <= 10 * t / seconds < i + 1]
        most = {name: max((found[name] for found in part), default=0) for name in ("RssAnon", "RssFile")}
        print(f"  up to {seconds * (i + 1) / 10:6.0f} s  " + "  ".join(f"{k} {v:6,} MiB" for k, v in most.items()))


def one_pass(data: str, model: str) -> None:
    """Every batch of a stream once, for a process of its own."""
    from transformers import AutoTokenizer

    from dora_cli.config.schema import DataConfig
    from dora_cli.data.sources import buffer_size, load_rows
    from dora_cli.data.streaming import BatchStream
    from dora_cli.data.tasks import build_task

    config = DataConfig(task="clm", path=data, max_length=512, max_eval_samples=200, cache=None, streaming=True)
    rows = load_rows(config, offline=True, seed=1, stream=buffer_size(config))
    task, tokenizer = build_task(config), AutoTokenizer.from_pretrained(model)

    def encode(part: Any) -> Any:
        task.fit(part)
        return task.encode(part.splits["train"], tokenizer)

    stream = BatchStream(rows, encode, batch_size=8, seed=1, remember=1)
    begin, used, tokens = time.perf_counter(), time.process_time(), 0
    for batch, _ in stream.batches():
        if stream.buffer and stream.row == rows.stream.first:  # the next pass
            break
        tokens += int(batch["attention_mask"].sum())
    wall, used = time.perf_counter() - begin, time.process_time() - used
    print(f"  {stream.count:,} batches of {stream.buffer} buffers, {tokens:,} tokens: {tokens / wall:,.0f} tokens/s")
    print(f"  {tokens / used:,.0f} tokens per second of a processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--limit", type=int, default=600, help="MiB")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    data, model = options.folder / "texts.jsonl", options.folder / "model"
    if not data.exists():
        write_set(data, int(options.gib * 2**30))
    if not model.exists():
        subprocess.run([sys.executable, __file__, "--write-model", str(model)], check=True)
    print(f"{data.stat().st_size / 2**20:,.0f} MiB of text, {options.limit:,} MiB of memory")
    environment = {**os.environ, "XDG_CACHE_HOME": str(options.folder / "cache"), "MALLOC_ARENA_MAX": "2"}
    for case in options.cases:
        words = ["recipe=clm_text", f"model.name={model}", f"data.path={data}", f"out={options.folder / case}"]
        words += ["data.max_eval_samples=200", f"train.max_steps={options.steps}", "overwrite=true", *CASES[case]]
        command = ["-m", "dora_cli.cli.train", *words]
        if case == "pass":
            command = [__file__, "--pass", str(data), str(model)]
        print(f"{case}:", flush=True)
        watched(command, options.limit, environment)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write-model"]:
        write_model(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--pass"]:
        one_pass(*sys.argv[2:])
    else:
        main()
