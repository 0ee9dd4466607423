"""Run folders as dora-train leaves them, made of a few lines of arithmetic."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MODULES = [
    f"bert.encoder.layer.{layer}.{kind}"
    for layer in range(3)
    for kind in ("attention.self.query", "attention.output.dense", "output.dense")
]
CONFIG = """# @package _global_
# Every value of a run, as it was used.
#   dora-train recipe=THIS_FILE out=NEW      repeats it
#   recipe: toy
#   command: dora-train recipe=toy budget={budget} seed={seed}
defaults:
- _self_
- override /model: tiny
- override /data: words
- override /adapter: components
- override /importance: component_norm
- override /schedule: cubic_late
- override /allocator: prune
- override /method: {method}
budget: {budget}
seed: {seed}
model:
  name: tiny & <small>
train:
  learning_rate: {rate}
"""


def event(step: int, rank: int) -> dict[str, Any]:
    ranks = {name: max(0, rank - i % 3) for i, name in enumerate(MODULES)}
    alive = sum(ranks.values())
    standing = {
        "quantiles": [0.01 * (i + 1) for i in range(21)],
        "lowest_kept": 0.1,
        "highest_lost": 0.09,
        "lost": [[MODULES[0], 3, 0.09]],
        "nearly_lost": [[MODULES[1], 1, 0.1]],
    }
    counts = {"budget": alive, "budget_unit": "components", "alive": alive, "params": 100 * alive}
    return {"step": step, "split": "allocation", **counts, "ranks": ranks, "standing": standing}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run of 40 steps with events at 10, 20 and 30 and evaluations every 10, and return its folder."""

    def make(
        name: str = "run",
        *,
        method: str = "dora",
        budget: Any = 0.25,
        seed: int = 1,
        rate: float = 0.001,
        value: float = 0.8,
        params: int = 600,
        finished: bool = True,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = CONFIG.format(method=method, budget="null" if budget is None else budget, seed=seed, rate=rate)
        (folder / "config.yaml").write_text(text)
        records: list[dict[str, Any]] = []
        for step in range(5, 41 if finished else 21, 5):
            records.append({"step": step, "split": "train", "loss": 1 / step, "learning_rate": rate})
            if step % 10 == 0:
                if step < 40:
                    records.append(event(step, 8 - step // 5))
                accuracy = value - (40 - step) / 100
                records.append({"step": step, "split": "validation", "loss": 2 / step, "accuracy": accuracy})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        if finished:
            ranks = event(30, 2)["ranks"]
            (folder / "summary.json").write_text(json.dumps(summary(method, seed, budget, value, params, ranks)))
        return folder

    def summary(
        method: str, seed: int, budget: Any, value: float, params: int, ranks: dict[str, int]
    ) -> dict[str, Any]:
        parameters = {"components_start": 72, "components_end": 9, "params_start": 7200, "params_end": params}
        speed = {"seconds": 62.0, "samples_per_second": 100.0, "tokens_per_second": 900.0}
        return {
            "recipe": "toy",
            "method": method,
            "seed": seed,
            "budget": {"requested": budget, **parameters},
            "unit": "components",
            "head_params": 50,
            "trained_params": params + 50,
            "trained_params_mean": 2000,
            "metrics": {"validation": {"loss": 0.05, "accuracy": value}},
            "best": {"step": 40, "name": "accuracy", "value": value},
            "last": {"step": 40, "name": "accuracy", "value": value},
            "train": {
                "steps": 40,
                "samples": 320,
                "tokens": 5000,
                "skipped": 0,
                **speed,
                "processes": 1,
                "peak_rss_mib": 500,
                "peak_device_mib": None,
            },
            "ranks": ranks,
            "versions": {"python": "3.11"},
        }

    return make


@pytest.fixture
def run_tiny(model_dir: Path, data_dir: Path, tmp_path: Path, remember_compositions: None) -> Callable[..., Path]:
    """A real run of a few steps; returns its folder."""
    from dora_cli.cli.train import main

    def run(*overrides: str) -> Path:
        folder = tmp_path / "real"
        options = ["data.max_length=16", "train.batch_size=8", "train.max_steps=12", "train.learning_rate=0.01"]
        words = [f"model.name={model_dir}", f"data.path={data_dir}", f"out={folder}", *options, *overrides]
        assert main(["recipe=text_classification", *words]) == 0
        return folder

    return run


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser without a window; tests that need one are skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (program and driver):
        pytest.skip("no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield opened
    opened.quit()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """The browser; a page that it opens may neither complain in the console nor fetch anything."""
    yield chromium
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return performance.getEntriesByType('resource').length") == 0
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
