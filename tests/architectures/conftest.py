"""Runs of the real command on tiny models of every architecture, with the trained model at hand."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CLASSIFIER, LANGUAGE = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
TASKS = {CLASSIFIER: "text_classification", LANGUAGE: "clm_text"}
# Twenty steps; the plug is pulled at the tenth, amid the pruning, which ends at the fourteenth.
COMMON = [
    *("method=dora", "regularizer=none", "adapter.rank=4", "budget=0.5", "data.max_length=12", "data.cache=null"),
    *("schedule.start=4", "schedule.end=14", "allocator.interval=2", "train.scheduler=constant", "seed=2"),
    *("train.learning_rate=0.03", "train.head_learning_rate=0.003", "train.batch_size=8", "train.max_steps=20"),
    *("train.save_every=10", "train.eval_every=20"),
]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of words, of more or fewer than there is room for, and a label."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    for split, n in (("train", 48), ("validation", 8)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(n):
                words = [f"w{draw.randrange(i % 2, 40, 2)}" for _ in range(draw.randint(2, 14))]
                file.write(json.dumps({"text": " ".join(words), "label": ("even", "odd")[i % 2]}) + "\n")
    return folder


class Run:
    """A finished run.

    Attributes:
        out: its folder.
        session: its parts, the trained model among them.
        auto_class: transformers' class of its task.
    """

    def __init__(self, out: Path, session: Any, auto_class: str) -> None:
        self.out, self.session, self.auto_class = out, session, auto_class

    def base(self) -> Any:
        """The base as anybody loads it for the task."""
        labels = {"num_labels": 2} if self.auto_class == CLASSIFIER else {}  # BART's own configuration has three
        return self.load(self.session.config.model.name, **labels)

    def load(self, folder: Path | str, **options: Any) -> Any:
        import transformers

        return getattr(transformers, self.auto_class).from_pretrained(folder, **options)

    def through_peft(self) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(self.base(), self.out / "adapter")

    @staticmethod
    @torch.no_grad()
    def logits(model: Any, top: int = 44) -> Tensor:
        """Of three rows, of which one is padded; ``top`` words are known."""
        ids = torch.randint(4, top, (3, 9), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        ids[:, -1], ids[1, 5] = 3, 3  # BART reads the end token
        ids[1, 6:], mask[1, 6:] = 0, 0
        logits: Tensor = model.eval()(input_ids=ids, attention_mask=mask).logits
        return logits if logits.dim() == 2 else logits[mask.bool()]


@pytest.fixture(scope="session")
def one_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def place(one_place: Path) -> Iterator[Path]:
    """An empty folder, the same for all: where only what lies in it differs, a configuration is composed once."""
    yield one_place
    for folder in one_place.iterdir():
        shutil.rmtree(folder)


@pytest.fixture
def tune(texts: Path, place: Path, remember_compositions: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Run the real command in this process: ``tune(auto_class, *words, out=NAME)``, on the base in ``place``."""
    from dora_cli.cli import train_run
    from dora_cli.cli.train import main

    sessions: list[Any] = []
    build = train_run.build
    monkeypatch.setattr(train_run, "build", lambda *a, **k: sessions.append(build(*a, **k)) or sessions[-1])

    def run(auto_class: str, *words: str, out: str = "run") -> Run:
        where = [f"recipe={TASKS[auto_class]}", f"model.name={place}/base", f"data.path={texts}", f"out={place}/{out}"]
        assert main([*where, *COMMON, *words]) == 0
        return Run(place / out, sessions[-1], auto_class)

    return run


@pytest.fixture
def tune_twice(
    tune: Callable[..., Run], unplugged_at: Callable[[int], AbstractContextManager[None]]
) -> Callable[..., tuple[Run, Run]]:
    """The same run whole, and interrupted at step 10 and resumed."""

    def twice(auto_class: str, *words: str) -> tuple[Run, Run]:
        whole = tune(auto_class, *words, out="whole")
        with unplugged_at(10):
            tune(auto_class, *words)
        return whole, tune(auto_class, *words, "resume=true")

    return twice


@pytest.fixture
def save_base(tiny_models: Any, place: Path) -> Callable[..., Path]:
    """Save a tiny base into ``place``: kind, the task's class, the class its checkpoint is saved from, changes."""

    def save(kind: str, auto_class: str, saved_as: str, **changes: Any) -> Path:
        tokens = tiny_models.ENCODER_TOKENS if auto_class == CLASSIFIER else tiny_models.DECODER_TOKENS
        folder: Path = tiny_models.save_shaken(place / "base", kind, saved_as, tokens, **changes)
        return folder

    return save


@pytest.fixture
def check_same(place: Path) -> Callable[[Run], Tensor]:
    """Check that trained, merged and PEFT's model say the same; returns what they say."""
    from dora_cli.cli.merge import main as dora_merge

    def check(run: Run) -> Tensor:
        merged = place / "merged"
        assert dora_merge([f"checkpoint={run.out}", f"out={merged}"]) == 0
        trained = run.logits(run.session.model)
        assert torch.allclose(run.logits(run.load(merged)), trained, atol=1e-5)
        assert torch.allclose(run.logits(run.through_peft()), trained, atol=1e-5)
        return trained

    return check
