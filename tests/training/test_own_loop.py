"""The Python API and the Trainer's callback keep the units that ``dora-train`` keeps on the same batches."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from dora_cli import Dora, DoraCallback, adapt
from dora_cli.adapters.inject import remove
from dora_cli.errors import UserError

METHOD = {"method": "dora", "budget": 0.25}
OPTIONS = {"adapter.rank": 4, "allocator.interval": 3, "schedule.start": 0.2, "regularizer.weight": 0.3}
STEPS = 30


@dataclass
class Reference:
    """A run of the command: its batches, its bare model as it began, and what it kept."""

    batches: list[dict[str, Tensor]]
    model: nn.Module
    events: list[dict[str, Any]]
    ranks: dict[str, int]
    adapter: Path
    train: Any  # its train.* configuration

    def bare(self) -> nn.Module:
        return deepcopy(self.model)

    def adapted(self, **more: Any) -> tuple[Dora, torch.optim.Optimizer]:
        dora = adapt(self.bare(), **{**METHOD, "options": OPTIONS, **more})
        groups = dora.parameter_groups(lr=self.train.learning_rate, weight_decay=self.train.weight_decay)
        return dora, torch.optim.AdamW(groups, fused=True)

    def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        from dora_cli.training.optim import build_scheduler

        return build_scheduler(optimizer, self.train, STEPS)


@pytest.fixture(scope="module")
def reference(model_dir: Path, data_dir: Path, composed: Any, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The base has no dropout of its own; the adapters have the preset's."""
    from dora_cli.cli.parts import load_parts
    from dora_cli.cli.train import main
    from dora_cli.training.setup import build

    folder = tmp_path_factory.mktemp("reference")
    base, run = folder / "base", folder / "run"
    shutil.copytree(model_dir, base)
    config = json.loads((base / "config.json").read_text())
    dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config | dry))
    given = {"train.batch_size": 8, "train.max_steps": STEPS, "train.learning_rate": 0.01, "data.max_length": 16}
    given |= {
        **METHOD,
        **OPTIONS,
        "model.name": base,
        "data.path": data_dir,
        "train.device": "cpu",
        "out": run,
        "save.which": "last",
    }
    assert main(["recipe=text_classification", *(f"{key}={value}" for key, value in given.items())]) == 0
    session = build(composed([f"recipe={run / 'config.yaml'}"], load_parts()))
    stream = session.micro_batches(0)
    batches = [next(stream)[0] for _ in range(STEPS)]
    for name in session.layers:
        remove(session.model, name)
    events = json.loads((run / "ranks.json").read_text())
    ranks = json.loads((run / "summary.json").read_text())["ranks"]
    return Reference(batches, session.model, events, ranks, run / "adapter", session.config.train)


def train(reference: Reference, dora: Dora, optimizer: Any, scheduler: Any, steps: range) -> list[dict[str, Any]]:
    """The loop of the documentation."""
    events = []
    dora.model.train()
    for step in steps:
        dora.model(**reference.batches[step]).loss.backward()
        dora.after_backward()
        nn.utils.clip_grad_norm_(dora.model.parameters(), reference.train.clip_norm)
        optimizer.step()
        event = dora.after_step(optimizer)
        scheduler.step()
        optimizer.zero_grad()
        if event is not None:
            events.append(event)
    return events


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits  # type: ignore[no-any-return]


def test_a_loop_of_ones_own_keeps_the_units_of_dora_train(reference: Reference, tmp_path: Path) -> None:
    from peft import PeftModel

    dora, optimizer = reference.adapted(total_steps=STEPS)
    events = train(reference, dora, optimizer, reference.schedule(optimizer), range(STEPS))
    assert [e["step"] for e in events] == [e["step"] for e in reference.events]
    assert [e["ranks"] for e in events] == [e["ranks"] for e in reference.events]
    assert dora.ranks() == reference.ranks and sum(dora.ranks().values()) == 12

    # What it saves is what it is, for PEFT, and what is left after merging and unloading.
    batch = reference.batches[0]
    here = logits(dora.model, batch)
    dora.save(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    theirs = json.loads((reference.adapter / "adapter_config.json").read_text())
    assert {k: saved[k] for k in ("target_modules", "rank_pattern", "modules_to_save", "task_type")} == {
        k: theirs[k] for k in ("target_modules", "rank_pattern", "modules_to_save", "task_type")
    }
    mine, command = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", reference.adapter)
    )
    torch.testing.assert_close(mine, command, rtol=0, atol=1e-4)
    loaded = PeftModel.from_pretrained(reference.bare(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batch), here, rtol=0, atol=1e-5)
    merged = deepcopy(dora)
    torch.testing.assert_close(logits(merged.merge(), batch), here, rtol=0, atol=1e-5)
    plain = dora.unload()
    assert {n for n, _ in plain.named_modules()} == {n for n, _ in reference.model.named_modules()}
    for name, value in reference.model.state_dict().items():
        assert name.startswith("classifier") or torch.equal(value, plain.state_dict()[name]), name


class Batches(IterableDataset[dict[str, Tensor]]):
    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


def trainer(reference: Reference, folder: Path, dora: Dora, optimizer: Any, args: Any = None, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "max_grad_norm": reference.train.clip_norm,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }
    return Trainer(
        dora.model,
        args or TrainingArguments(**given),
        train_dataset=Batches(reference.batches),
        data_collator=lambda rows: rows[0],
        optimizers=(optimizer, reference.schedule(optimizer)),
        callbacks=[DoraCallback(dora)],
    )


def test_a_trainer_keeps_the_units_of_dora_train_resumed_or_not(reference: Reference, tmp_path: Path) -> None:
    folder, step = tmp_path / "trainer", 12  # between two events; some units are silent then
    whole, optimizer = reference.adapted()
    first = trainer(reference, folder, whole, optimizer, save_strategy="steps", save_steps=step)
    first.train()
    assert whole.ranks() == reference.ranks
    assert [e["ranks"] for c in first.callback_handler.callbacks for e in getattr(c, "events", [])] == [
        e["ranks"] for e in reference.events
    ]
    assert first.args.max_grad_norm == reference.train.clip_norm

    resumed, optimizer = reference.adapted()
    second = trainer(reference, folder, resumed, optimizer, save_strategy="steps", save_steps=step)
    second.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.step == STEPS and resumed.ranks() == reference.ranks
    for name, parameter in whole.trained_parameters().items():
        assert torch.equal(parameter, resumed.trained_parameters()[name]), name


@pytest.mark.parametrize("method", ["dora", "increlora"])
def test_a_loop_of_ones_own_resumes_exactly(method: str, reference: Reference, tmp_path: Path) -> None:
    options = OPTIONS if method == "dora" else {"allocator.interval": 3}
    given = {"method": method, "budget": "r2", "options": options, "total_steps": STEPS}
    whole, optimizer = reference.adapted(**given)
    scheduler = reference.schedule(optimizer)
    train(reference, whole, optimizer, scheduler, range(20))
    whole.save_state(tmp_path / "states", optimizer)
    train(reference, whole, optimizer, scheduler, range(20, STEPS))

    resumed, optimizer = reference.adapted(**given)
    scheduler = reference.schedule(optimizer)
    for _ in range(resumed.load_state(tmp_path / "states", optimizer)):
        optimizer.zero_grad()
        scheduler.step()
    train(reference, resumed, optimizer, scheduler, range(20, STEPS))
    assert resumed.step == STEPS and resumed.ranks() == whole.ranks()
    theirs = resumed.trained_parameters()
    assert theirs.keys() == whole.trained_parameters().keys()
    for name, parameter in whole.trained_parameters().items():
        assert torch.equal(parameter, theirs[name]), name


def test_a_trainers_own_optimizer_and_methods_that_reshape_it_are_refused(reference: Reference, tmp_path: Path) -> None:
    dora, optimizer = reference.adapted()
    with pytest.raises(UserError, match="optimizer of its own"):
        trainer(reference, tmp_path, dora, torch.optim.AdamW(dora.model.parameters())).train()
    dora, optimizer = reference.adapted(method="increlora", budget="r2", options={})
    with pytest.raises(UserError, match="method=increlora changes what is in the optimizer"):
        trainer(reference, tmp_path, dora, optimizer, save_strategy="steps").train()


def test_an_interrupted_trainer_leaves_its_arguments_clipping_and_any_optimizer_ends_compact(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    from dora_cli import callback

    def pull(*_: Any) -> None:
        raise KeyboardInterrupt

    norms: list[float] = []
    monkeypatch.setattr(callback, "clip_grad_norm_", lambda parameters, norm: norms.append(norm))
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda *_: pytest.fail("the Trainer clips too"), raising=False)
    dora, optimizer = reference.adapted()
    dora.model.register_forward_pre_hook(pull)
    first = trainer(reference, tmp_path, dora, optimizer, max_grad_norm=0.5, max_steps=12)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert first.args.max_grad_norm == pickle.loads(pickle.dumps(first.args)).max_grad_norm == 0.5
    assert {first.args.max_grad_norm > 0 for _ in range(2)} >= {True}, "one step at most goes without"
    for norm in (0.5, None):
        first.args.max_grad_norm, norms[:] = norm, []
        dora, _ = reference.adapted()
        optimizer = torch.optim.Adafactor(dora.parameter_groups(lr=1e-3))  # type: ignore[attr-defined]
        trainer(reference, tmp_path, dora, optimizer, first.args).train()
        assert norms == ([norm] * 12 if norm else []) and first.args.max_grad_norm == norm
        assert {n: len(layer.c) for n, layer in dora.layers.items() if len(layer.c)} == {
            n: rank for n, rank in dora.ranks().items() if rank
        }


class Net(nn.Module):
    """No transformer: its layers are named."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def test_any_module_takes_adapters_and_parts_by_object(tmp_path: Path) -> None:
    from dora_cli.adapters.components import Components
    from dora_cli.allocation.schedules import Linear

    torch.manual_seed(0)
    net, before = Net(), torch.get_rng_state()
    parts = {"adapter": Components(rank=6, targets=["first"]), "schedule": Linear(start=0.2, end=0.6)}
    with mock.patch.object(torch.cuda, "manual_seed_all") as devices:
        dora = adapt(net, budget=0.5, total_steps=20, heads=["last"], options={"allocator.interval": 1}, **parts)
    devices.assert_not_called()
    assert torch.equal(torch.get_rng_state(), before), "the loop's random numbers are its own"
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        *(f"first.{n}" for n in "abc"),
        "last.weight",
        "last.bias",
    ]
    optimizer = torch.optim.SGD(dora.parameter_groups(lr=0.1, head_lr=0.5), momentum=0.9)
    assert {g["lr"] for g in optimizer.param_groups} == {0.1, 0.5}
    x, y = torch.randn(32, 8), torch.randint(0, 2, (32,))
    counts = []
    for _ in range(20):
        nn.functional.cross_entropy(net(x), y).backward()
        dora.after_backward()
        optimizer.step()
        event = dora.after_step(optimizer)
        optimizer.zero_grad()
        counts += [(event["step"], event["alive"])] if event else []
    assert counts == [(4 + k, 3 + round(3 * (1 - k / 8))) for k in range(9)], "linear from 6 at step 4 to 3 at step 12"
    expected = net(x)
    dora.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
    dora.merge()
    assert type(net.first) is nn.Linear
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "dorra"}, "unknown method 'dorra'"),
        ({"budget": None}, "none is set"),
        ({"options": {"adapter.rnk": 4}}, "unknown key 'adapter.rnk'"),
        ({"options": {"adapter.rank": "four"}}, "is not a whole number"),
        ({"options": {"importance.beta_uncertainty": 0.5}}, "component_norm does not read it"),
        ({"schedul": "linear"}, "no argument 'schedul'"),
        ({"schedule": "constant"}, "never moves"),
        ({"method": "eva", "budget": "r2"}, "looks at training data"),
        ({"method": "alora", "budget": "r2"}, "asks for the loss on a fixed batch"),
        ({"schedule": "auto", "budget": None}, "schedule=auto asks for the loss on held-out rows"),
        ({"heads": ["lost"]}, "no module 'lost'"),
        ({"heads": "last"}, "heads='last' is no list of names"),
        ({"seed": "one"}, "seed='one' is no seed"),
        ({"total_steps": 0}, "total_steps=0 is no number"),
        ({"total_steps": 10.5}, "total_steps=10.5 is no number"),
        ({}, "no linear layers inside transformer layers"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model_alone(given: dict[str, Any], message: str) -> None:
    net = Net()
    options = {"adapter.rank": 4}
    with pytest.raises(UserError, match=message):
        adapt(net, **{"method": "dora", "budget": 0.5, "options": options, **given})
    assert type(net.first) is nn.Linear and all(p.requires_grad for p in net.parameters())


def small(optimizer: Any = torch.optim.AdamW, **more: Any) -> tuple[Dora, Any]:
    options = {"adapter.rank": 4, "adapter.targets": ["first"], "allocator.interval": 2} | more.pop("options", {})
    dora = adapt(Net(), **{"budget": 0.5, "total_steps": 20, "heads": ["last"], **more, "options": options})
    return dora, optimizer(dora.parameter_groups(lr=1e-3))


def step(dora: Dora, optimizer: Any) -> None:
    dora.model(torch.ones(1, 8)).sum().backward()
    dora.after_backward()
    optimizer.step()
    dora.after_step(optimizer)


def test_an_optimizer_without_a_number_for_each_of_a_parameters_is_refused_at_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Adafactor can't train tensors that change their size"):
        step(*small(torch.optim.Adafactor))  # type: ignore[attr-defined]
    static: dict[str, Any] = {"method": "lora", "budget": "r2", "options": {"allocator.interval": None}}
    dora, optimizer = small(torch.optim.Adafactor, **static)  # type: ignore[attr-defined]
    step(dora, optimizer)
    assert dora.save_state(tmp_path, optimizer).exists()
    optimizer.state[dora.model.last.bias]["calls"] = 1
    with pytest.raises(UserError, match="more than tensors, which save_state can't write"):
        dora.save_state(tmp_path, optimizer)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": 0.25}, "budget: 0.5 then, 0.25 now"),
        ({"options": {"adapter.rank": 6}}, "adapter.rank: 4 then, 6 now"),
        ({"options": {"allocator.interval": 3}}, "allocator.interval: 2 then, 3 now"),
        ({"schedule": "linear"}, "schedule: cubic_late then, linear now"),
        ({"heads": []}, "heads: last then, none now"),
        ({"export": "uniform"}, "export: exact then, uniform now"),
        ({"total_steps": 30}, "total_steps: 20 then, 30 now"),
    ],
)
def test_the_state_of_another_training_is_refused_by_what_differs(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dora, optimizer = small()
    step(dora, optimizer)
    dora.save_state(tmp_path, optimizer)
    again, optimizer = small()
    assert again.load_state(tmp_path, optimizer) == 1
    other, optimizer = small(**more)
    with pytest.raises(UserError, match="state of another training") as caught:
        other.load_state(tmp_path, optimizer)
    assert message in str(caught.value) and other.step == 0


def test_without_a_number_of_steps_it_says_so() -> None:
    dora = adapt(Net(), budget=0.5, options={"adapter.rank": 4, "adapter.targets": "re:.*"})
    with pytest.raises(UserError, match="how many optimizer steps"):
        dora.after_backward()
    with pytest.raises(UserError, match="total_steps=-1 is no number of steps"):
        dora.start(-1)
    dora.start(10)
    with pytest.raises(UserError, match="schedule already"):
        dora.start(10)
    with pytest.raises(UserError, match="adapters already"):
        adapt(dora.model, budget=0.5, options={"adapter.rank": 4})


def test_the_package_alone_imports_no_torch() -> None:
    code = "import sys, dora_cli; from dora_cli import cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
