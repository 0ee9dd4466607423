"""The shipped GLUE files say what the references say (METHODS 1, 2.8, 3), and name what the code knows."""

from pathlib import Path

import pytest
import yaml

from dora_cli.config.schema import DataConfig
from dora_cli.data.tasks import TASKS
from dora_cli.data.tasks.text import ROLES
from dora_cli.evaluation import CLASSIFICATION, REGRESSION

RECIPES = Path(__file__).parents[2] / "recipes"

# task → DoRA's learning rate, batch, epochs, η, Δ (the paper's table 8); LoRA's learning rate; AdaLoRA's, γ, ΔT
TABLE = {
    "rte": (2e-3, 16, 80, 0.5, 10, 5e-4, 1.2e-3, 0.3, 1),
    "mrpc": (2.5e-3, 16, 30, 0.3, 50, 4e-4, 1e-3, 0.1, 1),
    "stsb": (3e-3, 16, 45, 0.3, 10, 4e-4, 2.2e-3, 0.3, 10),
    "cola": (2e-3, 16, 45, 0.3, 10, 4e-4, 8e-4, 0.1, 10),
    "sst2": (8e-4, 64, 60, 0.5, 10, 5e-4, 8e-4, 0.1, 100),
    "qnli": (3.5e-3, 16, 12, 0.5, 50, 4e-4, 5e-4, 0.1, 100),
    "qqp": (1e-3, 16, 10, 0.3, 50, 5e-4, 8e-4, 0.1, 100),
    "mnli": (3e-3, 32, 10, 0.3, 50, 5e-4, 5e-4, 0.1, 100),
}
AFLORA = {  # rate of the adapter and of the head (METHODS 8)
    "rte": (1e-2, 4e-2),
    "mrpc": (1e-2, 8e-2),
    "stsb": (2e-2, 2e-2),
    "cola": (1e-2, 4e-2),
    "sst2": (4e-3, 4e-3),
    "qnli": (1e-3, 4e-3),
    "qqp": (4e-3, 4e-3),
    "mnli": (1e-2, 4e-3),
}
INCRELORA = {  # rate, γ, interval (METHODS 10, and the official scripts for rank 2, which say whose is which)
    "rte": (1.2e-3, 0.3, 100),
    "cola": (8e-4, 0.1, 100),
    "sst2": (8e-4, 0.1, 1000),
    "mnli": (3.5e-4, 0.1, 1000),
}
METRICS = {
    "cola": ["matthews"],
    "mrpc": ["accuracy", "f1"],
    "qqp": ["accuracy", "f1"],
    "stsb": ["pearson", "spearman"],
}


def read(path):
    text = (RECIPES / path).read_text(encoding="utf-8")
    return text.splitlines(), yaml.safe_load(text) or {}


def test_there_is_one_file_of_each_kind_for_each_task():
    for folder, pattern in (("data/glue", "{}.yaml"), ("recipe", "glue_{}.yaml")):
        names = {path.name for path in (RECIPES / folder).glob(pattern.format("*"))}
        assert names == {pattern.format(task) for task in TABLE}
    assert {path.name for path in (RECIPES / "tuned" / "glue").iterdir()} == set(TABLE)


def test_no_recipe_carries_one_methods_learning_rate_into_another():
    """A rate in a recipe would beat the method's: full fine-tuning at an adapter's rate."""
    for path in (RECIPES / "recipe").glob("*.yaml"):
        assert "learning_rate" not in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("train", {}), path


@pytest.mark.parametrize("task", TABLE)
def test_a_data_file_holds_known_keys_roles_and_metrics(task):
    _, data = read(f"data/glue/{task}.yaml")
    assert set(data) <= set(DataConfig.__dataclass_fields__)
    assert data["name"] == "nyu-mll/glue" and data["config"] == task and data["max_length"] == 128
    assert data["task"] in TASKS and set(data["columns"]) <= set(ROLES)
    assert data["metrics"] == METRICS.get(task, ["accuracy"])
    assert set(data["metrics"]) <= set(REGRESSION if data["task"] == "regression" else CLASSIFICATION)


@pytest.mark.parametrize("task", TABLE)
def test_a_recipe_has_the_papers_epochs_and_batch(task):
    lines, recipe = read(f"recipe/glue_{task}.yaml")
    assert lines[0] == "# @package _global_" and lines[1].startswith("# ")
    assert f"recipe=glue_{task}" in lines[2]
    assert {"override /data": f"glue/{task}"} in recipe["defaults"]
    assert recipe["budget"] == "r8" and recipe["adapter"] == {"rank": 12}
    _, batch, epochs, *_ = TABLE[task]
    assert recipe["train"] == {"epochs": epochs, "batch_size": batch}


@pytest.mark.parametrize("task", TABLE)
def test_tuned_values_are_those_of_the_references(task):
    dora_lr, _, _, eta, interval, lora_lr, adalora_lr, gamma, delta = TABLE[task]
    tuned = {}
    for path in sorted((RECIPES / "tuned" / "glue" / task).iterdir()):
        lines, tuned[path.stem] = read(path)
        assert lines[0] == "# @package _global_" and lines[1].startswith("# ")
    dora = {"train": {"learning_rate": dora_lr}, "regularizer": {"weight": eta}, "allocator": {"interval": interval}}
    increlora = {}
    if task in INCRELORA:
        rate, weight, steps = INCRELORA[task]
        increlora["increlora"] = {
            "train": {"learning_rate": rate},
            "regularizer": {"weight": weight},
            "allocator": {"interval": steps},
        }
    assert tuned == increlora | {
        "dora": dora,
        "dora_official": {"defaults": [f"glue/{task}/dora"]},
        "dora_paper": {name: dora[name] for name in ("train", "regularizer")},  # Algorithm 1 prunes at every step
        "lora": {"train": {"learning_rate": lora_lr}},
        "aflora": {"train": dict(zip(("learning_rate", "head_learning_rate"), AFLORA[task], strict=True))},
        **{method: {"defaults": [f"glue/{task}/lora"]} for method in ("alora", "dlora", "eva")},
        "elalora": {"train": {"learning_rate": adalora_lr}, "regularizer": {"weight": gamma}},
        "rslora": {"defaults": [f"glue/{task}/lora"]},
        "weight_decomposed": {"defaults": [f"glue/{task}/lora"]},
        "adalora": {
            "train": {"learning_rate": adalora_lr},
            "regularizer": {"weight": gamma},
            "allocator": {"interval": delta},
        },
        "adalora_official": {"defaults": [f"glue/{task}/adalora"]},
    }
