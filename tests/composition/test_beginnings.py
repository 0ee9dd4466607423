"""What a run begins with, and what its adapters' own gates close, counts in every part and in every file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.apply import apply_adapter
from dora_cli.cli.result_run import write_result
from dora_cli.errors import UserError
from dora_cli.training.summary import rank_map

STILL = "train.learning_rate=1e-9"  # nothing moves: what the run ends with is what it began with


@pytest.fixture
def lora(run: Any, tmp_path: Path) -> Any:
    trained = run("method=lora", "budget=r3")
    trained.out.rename(tmp_path / "lora")
    return trained


def test_a_growing_method_takes_over_a_whole_adapter_or_refuses_it(run: Any, lora: Any, tmp_path: Path) -> None:
    words = ["method=increlora", "budget=r4", f"adapter.init_from={tmp_path / 'lora'}", "regularizer=none", STILL]
    with pytest.raises(UserError, match="does not fit a layer of rank 1") as error:
        run(*words)
    assert "allocator.start_rank" in str(error.value.hint)
    trained = run(*words, "allocator.start_rank=3", "schedule.start=2", "schedule.end=6", "allocator.interval=2")
    assert trained.session.allocation.alive_count() == 4 * len(trained.session.targets)
    assert torch.allclose(trained.logits, lora.logits, atol=1e-3)  # spares' gates are 1e-5, not 0, while they train


def test_what_an_adapter_brings_along_is_no_displacement(run: Any, lora: Any, tmp_path: Path) -> None:
    words = ["method=dlora", "budget=r3", f"adapter.init_from={tmp_path / 'lora'}", STILL]
    trained = run(*words, "schedule.start=2", "schedule.end=8", "allocator.interval=2")
    allocation = trained.session.allocation
    assert float(allocation.importance.scores(allocation.table, None).max()) < 1e-3


def test_a_folder_that_is_not_there_is_refused_before_data_and_model(run: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder /nowhere"):
        run("method=lora", "budget=r2", "adapter.init_from=/nowhere", "data.path=/nowhere", "model.name=/nowhere")


def test_a_final_choice_among_modules_leaves_the_gates_of_components_alone(run: Any) -> None:
    words = ["adapter=gated", "importance=displacement", "allocator=kill_and_revive", "schedule=linear", "budget=r3"]
    trained = run(*words, "schedule.start=2", "schedule.end=6", "allocator.interval=2")
    assert trained.session.allocation.table.settled
    assert not any(layer.settled for layer in trained.session.layers.values())


def test_components_that_closed_gates_shut_off_are_neither_counted_nor_saved(run: Any, tmp_path: Path) -> None:
    trained = run("adapter=gated", "importance=none", "allocator=none", "schedule=constant", "budget=r3")
    session = trained.session
    with torch.no_grad():
        for layer in session.layers.values():
            layer.phi[1] = -3.0  # and with it the third, which is nested behind it
    assert set(rank_map(session).values()) == {1}
    write_result(session, tmp_path / "adapter", {"step": 10, "metrics": {}})
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 1
    fresh = trained.fresh_model()
    apply_adapter(fresh, read_adapter(tmp_path / "adapter"))
    assert torch.allclose(trained.logits_of(fresh), trained.logits_of(session.model), atol=1e-5)


def test_layers_that_read_one_input_are_joined_before_training(run: Any) -> None:
    joined = {name: layer.siblings for name, layer in run("method=dora", "budget=r2").session.layers.items()}
    groups = {id(s): [n.rpartition(".")[2] for n, t in joined.items() if t is s] for s in joined.values() if s}
    assert list(groups.values()) == [["query", "key", "value"]] * 2
