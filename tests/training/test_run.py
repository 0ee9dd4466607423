"""The whole command: every method trains, prunes to its count, exports, and evaluates to the same numbers."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Train = Callable[..., int]
SHRINKING = ["dora", "dora_official", "dora_paper", "adalora"]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "method", [m if m in ("dora", "adalora") else pytest.param(m, marks=pytest.mark.slow) for m in SHRINKING]
)
def test_shrinking_methods_count_by_the_schedule_and_end_on_budget(
    method: str, dora_train: Train, tmp_path: Path
) -> None:
    assert dora_train(f"method={method}", "budget=0.25", "adapter.rank=4", "allocator.interval=3") == 0
    run = tmp_path / "run"
    summary, events = summary_of(run), json.loads((run / "ranks.json").read_text())
    assert summary["budget"]["components_start"] == 12 * 4  # 6 linear layers in each of 2 transformer layers
    assert summary["budget"]["components_end"] == 12 == sum(summary["ranks"].values())
    assert len(summary["ranks"]) == 12
    total = summary["train"]["steps"]
    start, end = math.floor(0.15 * total), math.floor(0.5 * total)
    for event in events:
        assert event["alive"] == sum(event["ranks"].values())
        if method != "dora_official":
            assert event["alive"] == event["budget"]
        if method in ("dora", "dora_paper"):
            x = (event["step"] - start) / (end - start)
            assert event["budget"] == 12 + round(36 * (1 - x**3))
    final_step = max(event["step"] for event in events)
    assert events[-1]["alive"] == 12
    assert summary["best"]["step"] >= final_step, "before the final choice more than the budget is alive"


def test_a_static_method_spreads_the_same_budget(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("method=lora", "budget=r2.5", "train.max_steps=2") == 0
    ranks = list(summary_of(tmp_path / "run")["ranks"].values())
    assert ranks == [3] * 6 + [2] * 6


@pytest.mark.parametrize("method", ["lora", "full", "head", pytest.param("alora", marks=pytest.mark.slow), "aflora"])
def test_the_other_methods_learn_too(method: str, dora_train: Train, tmp_path: Path) -> None:
    options = ["train.learning_rate=3e-3"] if method == "full" else []
    budget = [] if method in ("full", "head") else ["budget=r2"]
    assert dora_train(f"method={method}", *budget, "train.epochs=4", *options) == 0
    run = tmp_path / "run"
    summary = summary_of(run)
    first = next(r["loss"] for r in metrics_of(run) if r["split"] == "train")
    last = [r["loss"] for r in metrics_of(run) if r["split"] == "train"][-1]
    assert last < first
    if method in ("full", "head"):
        assert summary["budget"]["requested"] is None
    if method == "alora":
        assert sum(summary["ranks"].values()) == 24
        assert len(set(summary["ranks"].values())) > 1, "no rank has moved"
    if method == "aflora":
        events = json.loads((run / "ranks.json").read_text())
        assert events[-1]["alive"] == 0, "at the end of its schedule every projection is frozen"


@pytest.mark.parametrize("method", ["dora", "adalora", "lora", "full", "head", "aflora"])
def test_eval_of_run_adapter_and_merged_gives_the_runs_numbers(method: str, dora_train: Train, tmp_path: Path) -> None:
    from dora_cli.cli.eval import main as dora_eval
    from dora_cli.cli.merge import main as dora_merge

    budget = [] if method in ("full", "head") else ["budget=r1", "adapter.rank=4"]
    assert dora_train(f"method={method}", *budget, "train.epochs=1") == 0
    run, merged = tmp_path / "run", tmp_path / "merged"
    expected = summary_of(run)["metrics"]["validation"]
    assert dora_merge([f"checkpoint={run}", f"out={merged}"]) == 0
    config = f"recipe={run}/config.yaml"
    for checkpoint, extra in ((run, []), (run / "adapter", []), (merged, [config])):
        out = tmp_path / f"eval-{checkpoint.name}"
        assert dora_eval([f"checkpoint={checkpoint}", f"out={out}", *extra]) == 0
        record = json.loads((out / "eval-validation.json").read_text())
        assert record["metrics"]["accuracy"] == expected["accuracy"]
        assert record["metrics"]["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        rows = [json.loads(line) for line in (out / "predictions-validation.jsonl").read_text().splitlines()]
        assert len(rows) == 32
        right = sum(row["prediction"] == row["reference"] for row in rows)
        assert right / 32 == pytest.approx(expected["accuracy"], abs=1e-6)


def test_accumulation_gives_the_gradient_of_all_its_rows(
    dora_train: Train, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rows a step in one, two uneven or four uneven micro-batches: under SGD the weights after six steps agree."""
    calm = tmp_path / "calm"
    shutil.copytree(model_dir, calm)
    config = json.loads((calm / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (calm / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused: torch.optim.SGD(groups))
    common = ["method=lora", "budget=r2", "train.epochs=6", "data.max_train_samples=10", f"model.name={calm}"]
    common += [
        "save.which=last",
        "train.learning_rate=0.5",
        "train.clip_norm=null",
        "train.weight_decay=0",
        "train.warmup=0",
    ]
    weights = []
    for batch_size, accumulation in ((10, 1), (6, 2), (3, 4)):
        out = tmp_path / f"a{accumulation}"
        assert (
            dora_train(*common, f"train.batch_size={batch_size}", f"train.accumulation={accumulation}", f"out={out}")
            == 0
        )
        assert summary_of(out)["train"]["steps"] == 6
        weights.append(load_file(out / "adapter/adapter_model.safetensors"))
    start = tmp_path / "start"
    assert dora_train(*common, "train.batch_size=10", "train.learning_rate=1e-12", f"out={start}") == 0
    initial = load_file(start / "adapter/adapter_model.safetensors")
    moves = [torch.cat([(w[name] - initial[name]).double().flatten() for name in initial]) for w in weights]
    for other in moves[1:]:
        assert float((moves[0] - other).norm()) < 1e-3 * float(moves[0].norm())


def test_gradient_checkpointing_changes_nothing_and_the_same_seed_gives_the_same_run(
    dora_train: Train, tmp_path: Path
) -> None:
    plain = ["budget=r1", "adapter.rank=2", "train.max_steps=10", "train.log_every=1"]
    assert dora_train(*plain, f"out={tmp_path}/plain") == 0
    assert dora_train(*plain, "train.gradient_checkpointing=true", f"out={tmp_path}/checkpointed") == 0
    losses = [[r["loss"] for r in metrics_of(tmp_path / x) if r["split"] == "train"] for x in ("plain", "checkpointed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert dora_train(*plain, f"out={tmp_path}/plain2") == 0
    one, two = (load_file(tmp_path / x / "adapter/adapter_model.safetensors") for x in ("plain", "plain2"))
    assert all(torch.equal(one[k], two[k]) for k in one), "the same seed gave another adapter"


def test_early_stopping_counts_only_evaluations_after_the_final_choice(dora_train: Train, tmp_path: Path) -> None:
    options = ["budget=r1", "adapter.rank=2", "train.max_steps=60", "train.eval_every=5", "train.patience=1"]
    assert dora_train(*options, "train.learning_rate=1e-9") == 0  # nothing ever gets better
    summary = summary_of(tmp_path / "run")
    assert summary["train"]["steps"] == 35  # the final choice is at 30: its evaluation is the best, the next ends it
    assert summary["best"]["step"] == 30


def test_last_weights_can_be_exported_instead_of_the_best(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("budget=r1", "adapter.rank=2", "train.max_steps=20", "save.which=last", "save.merged=true") == 0
    summary = summary_of(tmp_path / "run")
    method = json.loads((tmp_path / "run/adapter/method.json").read_text())
    assert method["step"] == 20 == summary["last"]["step"]
    assert (tmp_path / "run/merged/model.safetensors").exists()


def test_dry_run_prints_the_plan_and_makes_nothing(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_train("budget=0.25", "adapter.rank=4", "dry_run=true") == 0
    text = capsys.readouterr().out
    assert "48 components" in text
    assert "12 components" in text
    assert not (tmp_path / "run").exists()
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=r16", "adapter.rank=8"], "nothing to prune"),
        (["budget=1.5"], "budget"),
        (["budget=0.1"], "adapter.rank"),
        (["budget=null"], "budget"),
        (["budget=r1", "adapter.rank=2", "allocator.min_rank=2"], "min_rank"),
        (["budget=r1", "adapter=lora", "regularizer=none", "importance=freezing_score"], "freezing_score"),
        (["budget=r1", "adapter=full"], "adapter=full"),
        (["budget=r1", "allocator=none"], "allocator=none"),
        (["budget=600", "method=dora_official", "adapter.rank=4"], "counts components"),
        (["budget=r1", "method=dora_official", "schedule.start=0.5"], "schedule.start"),
        (["budget=r1", "method=lora", "importance=component_norm"], "read by nobody"),
        (["budget=r1", "schedule=exponential", "schedule.rate=-1000"], "schedule.rate"),
        (["budget=r1", "importance=none"], "importance"),
        (["budget=r1", "schedule=constant"], "constant"),
        (["budget=r1", "schedule.start=0.9"], "schedule.start"),
        (["budget=r1", "adapter.targets=[nonsense]"], "nonsense"),
        (["budget=r1", "data.path=/nowhere"], "/nowhere"),
        (["budget=r1", "model.name=./nowhere"], "nowhere"),
        (["budget=r1", "train.device=cuda"], "cuda"),
        (["budget=r1", "adapter.init_from=/nowhere"], "nowhere"),
    ],
)
def test_a_users_mistake_is_one_message_and_leaves_no_folder(
    overrides: list[str], message: str, dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "train.device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    method = [] if any(word.startswith("method=") for word in overrides) else ["method=dora"]
    assert dora_train(*method, *overrides) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert message in text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 6
    assert not (tmp_path / "run").exists()


def test_finished_and_foreign_folders_are_left_alone(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["method=lora", "budget=r1", "train.max_steps=2"]
    assert dora_train(*short) == 0
    before = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    assert dora_train(*short) == 2
    assert "finished" in capsys.readouterr().err
    assert dora_train(*short, "resume=true") == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == before
    (tmp_path / "run/notes.txt").write_text("mine")
    assert dora_train(*short, "seed=2", "overwrite=true") == 0
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() != before
    (tmp_path / "other/checkpoints").mkdir(parents=True)
    (tmp_path / "other/config.yaml").write_text("model: theirs\n")
    (tmp_path / "other/checkpoints/precious.pt").write_text("…")
    assert dora_train(*short, f"out={tmp_path}/other", "overwrite=true") == 2
    assert (tmp_path / "other/checkpoints/precious.pt").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("…")
    assert dora_train(*short, f"out={tmp_path}/home", "overwrite=true") == 2
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_trained_adapter_can_be_the_start_of_another_method(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("method=lora", "budget=r2", f"out={tmp_path}/first") == 0
    reached = summary_of(tmp_path / "first")["last"]["value"]
    options = ["method=dora", "budget=r2", "adapter.rank=3", f"adapter.init_from={tmp_path}/first"]
    assert dora_train(*options, "train.max_steps=2", "train.learning_rate=1e-6", "train.eval_every=1") == 0
    assert summary_of(tmp_path / "run")["metrics"]["validation"]["accuracy"] >= reached - 0.1


def test_a_runs_configuration_repeats_it(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("budget=r1", "adapter.rank=2", "train.max_steps=12") == 0
    from dora_cli.cli.train import main

    assert main([f"recipe={tmp_path}/run/config.yaml", f"out={tmp_path}/again"]) == 0
    one, two = (load_file(tmp_path / x / "adapter/adapter_model.safetensors") for x in ("run", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert summary_of(tmp_path / "again")["recipe"] == "text_classification"


@pytest.mark.slow
def test_a_compiled_model_trains_alike_across_compaction(
    dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["budget=r1", "adapter.rank=4", "train.max_steps=14", "train.log_every=1", "adapter.dropout=0"]
    assert dora_train(*words, f"out={tmp_path}/eager") == 0
    real = torch.compile
    # Traced and guarded as usual, run without a C++ compiler: does a graph follow its parameters?
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    assert dora_train(*words, "train.compile=true", f"out={tmp_path}/compiled") == 0
    losses = [[r["loss"] for r in metrics_of(tmp_path / x) if r["split"] == "train"] for x in ("eager", "compiled")]
    assert len(losses[0]) == 14
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_eval_reads_an_adapter_that_peft_wrote(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from dora_cli.cli.eval import main as dora_eval

    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=32, target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "theirs")
    words = [f"checkpoint={tmp_path}/theirs", f"base={model_dir}", "recipe=text_classification"]
    words += [f"data.path={data_dir}", "data.max_length=16", f"out={tmp_path}/eval"]
    assert dora_eval(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "eval/predictions-validation.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [json.loads(line)["text"] for line in (data_dir / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    assert [row["prediction"] for row in rows] == [("negative", "positive")[i] for i in expected.tolist()]


def test_eval_refuses_a_base_that_does_not_fit(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    from transformers import BertConfig, BertModel

    from dora_cli.cli.eval import main as dora_eval

    assert dora_train("method=lora", "budget=r1", "train.max_steps=2") == 0
    other = tmp_path / "other"
    settings = BertConfig.from_pretrained(model_dir, hidden_size=32)
    BertModel(settings).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((model_dir / name).read_bytes())
    capsys.readouterr()
    assert dora_eval([f"checkpoint={tmp_path}/run", f"base={other}"]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert dora_eval([f"checkpoint={tmp_path}/nowhere"]) == 2
    assert dora_eval(["checkpoint=x", "splitt=test"]) == 2
    assert "did you mean 'split'" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [pytest.param("r1", marks=pytest.mark.slow), "600"])
def test_alora_stays_on_budget_however_small_it_is(budget: str, dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("method=alora", f"budget={budget}", "train.epochs=8") == 0
    summary = summary_of(tmp_path / "run")
    events = json.loads((tmp_path / "run/ranks.json").read_text())
    assert 1 < len(events) <= 8
    assert len({tuple(event["ranks"].values()) for event in events}) > 1, "no rank has moved"
    if budget == "r1":
        assert sum(summary["ranks"].values()) == 12
    else:
        assert 500 < summary["budget"]["params_end"] <= 600
    assert summary["best"]["step"] >= events[-1]["step"]


def test_a_diverged_run_stops_with_a_message_and_exports_nothing(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=lora", "budget=r1", "train.learning_rate=1e30", "train.clip_norm=null"]
    assert dora_train(*words) == 2
    assert "diverged" in capsys.readouterr().err
    assert not (tmp_path / "run/adapter").exists()
    assert not (tmp_path / "run/summary.json").exists()


def test_method_state_maps_scores_and_gates_to_modules(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("budget=r1", "adapter.rank=4", "train.max_steps=20") == 0
    state = load_file(tmp_path / "run/adapter/method_state.safetensors")
    modules = json.loads((tmp_path / "run/adapter/method.json").read_text())["modules"]
    ranks = summary_of(tmp_path / "run")["ranks"]
    assert len(state["module"]) == 48
    alive = torch.bincount(state["module"][state["alive"]], minlength=len(modules)).tolist()
    assert dict(zip(modules, alive, strict=True)) == ranks
    assert bool((state["gate"][state["alive"]] != 0).all())
    assert not bool(state["gate"][~state["alive"]].any())
    kept, gone = state["score"][state["alive"]], state["score"][~state["alive"]]
    assert float(kept.min()) >= float(gone.max())
