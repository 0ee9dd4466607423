"""The base in a second process: the losses of one, bytes by the formula, and what happens when one of the two dies."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.cli.train import main
from dora_cli.training.apart.cloud import Cloud
from dora_cli.training.apart.wire import Link

Start = Callable[..., Any]
STEPS, ACCUMULATION, BATCH, LENGTH, WIDTH, WIDE = 16, 2, 8, 8, 16, 32
TOKENS = BATCH * LENGTH  # of a micro-batch
COMMON = [f"train.max_steps={STEPS}", f"train.accumulation={ACCUMULATION}", "train.log_every=1", "train.save_every=6"]
COMMON += [f"train.eval_every={STEPS}", "train.learning_rate=0.02", "adapter.dropout=0.1", "budget=r2"]
KILL_AND_REVIVE = ["method=dlora", "allocator.killed=drop", "allocator.interval=2", "allocator.active=0.25"]
KILL_AND_REVIVE += ["allocator.probation=2"]
FREEZE = ["allocator.killed=freeze", *(word for word in KILL_AND_REVIVE if "killed" not in word)]
APART = "train.base=apart"


@pytest.fixture(scope="module")
def even_data(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one length, so that every batch has as many tokens."""
    folder, draw = tmp_path_factory.mktemp("even"), random.Random(0)
    for split, n in (("train", 96), ("validation", 32)):
        rows = []
        for i in range(n):
            words = [*draw.choices(tiny.FILLER, k=LENGTH - 3), draw.choice((tiny.BAD, tiny.GOOD)[i % 2])]
            rows.append({"text": " ".join(words), "label": ("negative", "positive")[i % 2]})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def with_dropout(still_model: Path) -> Iterator[None]:
    """The base itself drops entries out; the cloud draws them where the device stands in its random numbers."""
    file = still_model / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"hidden_dropout_prob": 0.1}))
    yield
    file.write_text(before)


@pytest.fixture(scope="module")
def whole() -> dict[str, Path]:
    """Runs of pairs that nothing has interrupted, by method, once they were made."""
    return {}


def records(run: Path, split: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == split]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def shape(name: str) -> tuple[int, int]:
    """(d_in, d_out)."""
    if name.endswith("intermediate.dense"):
        return WIDTH, WIDE
    return (WIDTH if "attention" in name else WIDE), WIDTH


def order(name: str) -> int:
    """Which modules of BERT a module reads from: all of a lower number."""
    layer, rest = name.removeprefix("bert.encoder.layer.").split(".", 1)
    kinds = ("attention.self", "attention.output", "intermediate", "output")
    return 4 * int(layer) + next(i for i, kind in enumerate(kinds) if rest.startswith(kind))


@pytest.mark.parametrize(
    "method",
    [KILL_AND_REVIVE, *(pytest.param(words, marks=pytest.mark.slow) for words in (["method=lora"], FREEZE))],
    ids=["kill_and_revive", "lora", "freeze"],
)
def test_losses_are_those_of_one_process_and_bytes_those_of_the_formula(
    method: list[str],
    start: Start,
    common: list[str],
    even_data: Path,
    with_dropout: None,
    whole: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = tmp_path / "sent"
    real = Link.send

    def send(self: Link, word: str, tensors: Any = None, **rest: Any) -> None:
        with sent.open("a") as file:
            file.write(f"{os.environ['RANK']} {word} {' '.join(tensors or {})}\n")
        real(self, word, tensors, **rest)

    monkeypatch.setattr(Link, "send", send)
    words = [*COMMON, *method, f"data.path={even_data}"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*common, *words, f"out={one}"]) == 0
    ended = start(*words, APART, f"out={two}").ends()
    assert [end.code for end in ended] == [0, 0], ended[0].err
    assert ended[1].out == ""
    whole[method[0]] = two

    losses = [[r["loss"] for r in records(run, "train")] for run in (one, two)]
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert max(losses[0]) - min(losses[0]) > 1e-2, "nothing is learnt: a test of nothing"
    assert read(one / "ranks.json") == read(two / "ranks.json")
    mine, theirs = adapter_of(one), adapter_of(two)
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in mine)

    names = list(read(two / "summary.json")["ranks"])
    events = {event["step"]: set(event.get("idle", ())) for event in read(two / "ranks.json")}
    idle: set[str] = set()
    forward = backward = unneeded = 0
    for step in range(1, STEPS + 1):
        on = names if method is FREEZE else [name for name in names if name not in idle]
        first = min(order(name) for name in names if name not in idle)
        forward += sum(sum(shape(name)) for name in on)
        # Up to the first that train nobody asks for the gradient of what a module reads.
        unneeded += sum(shape(name)[0] for name in on if order(name) <= first)
        unneeded += sum(shape(name)[1] for name in on if order(name) <= first and name in idle)
        backward += sum(sum(shape(name)) for name in on)
        idle = events.get(step, idle)
        if step in events and method is KILL_AND_REVIVE:
            per_token = next(e["per_token"]["values"] for e in read(two / "ranks.json") if e["step"] == step)
            assert per_token == sum(2 * sum(shape(name)) for name in names if name not in idle)
    size = 4 * TOKENS * ACCUMULATION
    traffic = read(two / "summary.json")["train"]["traffic"]
    assert traffic["training"]["adapters_forward"] == size * forward
    assert traffic["training"]["adapters_backward"] == size * (backward - unneeded)
    assert (traffic["formula"], traffic["unneeded"]) == (size * (forward + backward), size * unneeded)
    passes = STEPS * ACCUMULATION
    assert traffic["training"]["hidden"] == passes * 2 * 4 * BATCH * WIDTH  # the pooled first token, and its gradient
    assert traffic["training"]["inputs"] == passes * 2 * 8 * TOKENS  # ids and mask
    at_the_end = sum(sum(shape(name)) for name in names if method is FREEZE or name not in idle)
    assert traffic["evaluation"]["adapters_forward"] == 4 * 32 * LENGTH * at_the_end
    assert records(two, "train")[-1]["traffic"] == sum(traffic["training"].values())
    if method is KILL_AND_REVIVE:
        assert len(idle) == 9 and traffic["formula"] < 0.6 * size * STEPS * sum(2 * sum(shape(n)) for n in names)

    crossed = {word for line in sent.read_text().splitlines() if line[0] == "0" for word in line.split()[2:]}
    names_of = {"begin": {"adapted", "own", "reads"}, "states": {"states"}, "forward": {"input_ids", "attention_mask"}}
    assert crossed == set().union(*names_of.values()) | {"random", "0"}  # 0: the gradient of the output


@pytest.mark.slow
def test_a_pair_goes_on_to_the_same_bits_after_its_cloud_has_died(
    start: Start,
    even_data: Path,
    with_dropout: None,
    whole: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, cut = [*COMMON, *KILL_AND_REVIVE, APART, f"data.path={even_data}"], tmp_path / "cut"
    if (done := whole.get(KILL_AND_REVIVE[0])) is None:  # this test alone is run
        done = tmp_path / "whole"
        assert [end.code for end in start(*words, f"out={done}").ends()] == [0, 0]
    back, passes = Cloud._backward, [0]

    def die(self: Cloud, message: Any) -> None:
        passes[0] += 1
        if passes[0] == 8 * ACCUMULATION:
            os._exit(9)
        back(self, message)

    with monkeypatch.context() as patch:
        patch.setattr(Cloud, "_backward", die)
        device, cloud = start(*words, f"out={cut}").ends()
    assert (device.code, cloud.code) == (1, 9)
    assert "error: process 0 has lost" in device.err and "resume=true" in device.err
    assert "Traceback" not in device.err
    assert [path.name for path in (cut / "checkpoints").glob("step-*")] == ["step-00000006"]

    assert [end.code for end in start(*words, f"out={cut}", "resume=true").ends()] == [0, 0]
    mine, theirs = adapter_of(done), adapter_of(cut)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert read(done / "ranks.json") == read(cut / "ranks.json")
    counts = [read(run / "summary.json")["train"]["traffic"] for run in (done, cut)]
    for count in counts:
        for part in ("training", "evaluation"):
            del count[part]["control"]  # which modules are on is said anew
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.timeout=5"], "takes two processes, not 1"),
        (["dry_run=true", "train.gradient_checkpointing=true"], "train.gradient_checkpointing=true does not go with"),
        (["dry_run=true", "method=weight_decomposed"], "needs the base's own output"),
        (["dry_run=true", "method=bitfit"], "is trained itself"),
    ],
)
def test_what_cannot_be_done_apart_is_refused(
    words: list[str], message: str, model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["recipe=text_classification", f"model.name={model_dir}", f"data.path={data_dir}", "data.max_length=16"]
    method = [] if "method" in " ".join(words) else ["method=dlora"]
    assert main([*fixed, *method, "budget=r2", APART, f"out={tmp_path}/run", *words]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and message in text
    assert not (tmp_path / "run").exists()
