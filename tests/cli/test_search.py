"""``hydra/sweeper=optuna``: spaces, trials, which of them is the best, and the same ones again."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from dora_cli.cli import sweep
from dora_cli.config.check import known_keys
from dora_cli.config.overrides import Interval, parse_sweep
from dora_cli.config.schema import Config
from dora_cli.errors import UserError

# Its main metric is a parabola around budget 0.3, given as what METRIC says; seed=2 fails.
PARABOLA = """
import json, os, sys
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
if given.get("seed") == "2":
    sys.exit(1)
os.makedirs(given["out"])
value = (float(given["budget"]) - 0.3) ** 2
best = {"step": 1, "name": os.environ["METRIC"], "value": value if os.environ["METRIC"] == "loss" else -value}
json.dump({"best": best}, open(given["out"] + "/summary.json", "w"))
json.dump(given, open(given["out"] + "/config.yaml", "w"))
print("ran")
"""
SEARCH = ["recipe=glue_sst2", "hydra/sweeper=optuna", "budget=interval(0.05,0.9)", "out=s"]


@pytest.fixture(autouse=True)
def parabola(stand_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", reason="optuna is an extra")
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, "-c", PARABOLA])
    monkeypatch.setenv("METRIC", "accuracy")


def test_spaces_are_read_as_hydras_plugin_reads_them() -> None:
    words = {
        "budget": "interval(0.05,0.4)",
        "train.learning_rate": "tag(log,interval(1e-4,1e-2))",
        "train.warmup": "int(interval(1,8))",
        "seed": "range(1,8,3)",
        "train.clip_norm": "range(0.5,2.0,0.5)",
        "method": "dora,lora",
        "train.epochs": "shuffle(range(1,3))",
    }
    keys = known_keys(Config)
    shared, axes = parse_sweep([*(f"{k}={v}" for k, v in words.items()), "offline=true"], keys, [], search=True)
    assert shared == ["offline=true"]
    assert axes.pop("train.epochs") in (["1", "2"], ["2", "1"])
    assert list(axes.values()) == [
        Interval(0.05, 0.4),
        Interval(1e-4, 1e-2, log=True),
        Interval(1, 8),
        Interval(1, 7, 3),
        Interval(0.5, 1.5, 0.5),
        ["dora", "lora"],
    ]
    assert isinstance(axes["train.warmup"].low, int)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_best_trial_is_the_nearest_whichever_way_its_metric_goes(metric, monkeypatch, capfd) -> None:
    monkeypatch.setenv("METRIC", metric)
    assert sweep.sweep([*SEARCH, "seed=choice(1,2)", "hydra.sweeper.n_trials=4"]) in (0, 1)
    out = capfd.readouterr().out
    trials = [path.parent.name for path in Path("s").glob("0*/summary.json")]
    assert "sweep: job 4 of 4: budget=" in out and len(trials) >= 2
    found = yaml.safe_load(Path("s/optimization_results.yaml").read_text())
    budgets = [float(name.split("budget=")[1].split(",")[0]) for name in trials]
    nearest = min(budgets, key=lambda budget: abs(budget - 0.3))
    assert found["best_evaluated_params"]["budget"] == pytest.approx(nearest, rel=1e-3)
    assert abs(found["best_evaluated_result"]) == pytest.approx((nearest - 0.3) ** 2, rel=0.05)
    assert f"best: budget={found['best_evaluated_params']['budget']},seed=1  {metric} " in out


def test_the_same_command_proposes_the_same_again(capfd) -> None:
    words = [*SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2", "hydra/sweeper/sampler=random"]
    words += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert sweep.sweep(words) == 0
    before, out = sorted(os.listdir("s")), capfd.readouterr().out
    assert len(before) == 5 and before[1].startswith("000,budget=0."), before
    assert sweep.sweep(words) == 0
    assert sorted(os.listdir("s")) == before
    again = capfd.readouterr().out
    assert again.count("finished before") == 3
    assert out.splitlines()[-7:] == again.splitlines()[-7:], "best and table"


def test_search_finds_what_chance_would_not() -> None:
    """Thirty trials of the default sampler; only what a runner would do is feigned."""
    from dora_cli.cli.search import search
    from dora_cli.config.launching import take

    class Fast:
        at_once, ended = 1, 0

        def run(self, jobs, first, of):
            for job in jobs:
                job.out.mkdir(parents=True)
                value = -((float(dict(w.split("=") for w in job.name.split(","))["budget"]) - 0.3) ** 2)
                summary = {"best": {"step": 1, "name": "f1", "value": value}}
                (job.out / "summary.json").write_text(json.dumps(summary))
            return [sweep.Result(job, 0, "") for job in jobs]

    launching, rest = take([*SEARCH, "hydra.sweeper.n_trials=30"])
    assert len(search(sweep.read(rest, search=True), launching, Fast())) == 30
    found = yaml.safe_load(Path("s/optimization_results.yaml").read_text())
    assert abs(found["best_evaluated_params"]["budget"] - 0.3) < 0.02


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=interval(0,1)"], "method has names, not numbers"),
        (["train.epochs=interval(-1,2)"], "train.epochs=-1.0 is out of range"),
        (["train.max_steps=interval(1.5,8)"], "train.max_steps=1.5 is not a whole number or null"),
        (["train.epochs=interval(2,1)"], "train.epochs=interval(2,1) is no interval"),
        (["train.learning_rate=tag(log,interval(0,1))"], "train.learning_rate=tag(log,interval(0,1)) is no interval"),
    ],
)
def test_spaces_that_are_none_are_refused_before_any_job(words, message) -> None:
    with pytest.raises(UserError) as caught:
        sweep.sweep([*SEARCH, *words])
    assert caught.value.message == message
    assert not os.listdir()
