"""Trackers have what metrics.jsonl has, once, whatever happens to the run or to them."""

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from dora_cli.processes import World
from dora_cli.reporting.events import MetricsFile, read_metrics
from dora_cli.reporting.trackers import TRACKERS, base

Train = Callable[..., int]
WORDS = ["budget=0.25", "adapter.rank=4", "train.max_steps=24", "train.log_every=3", "train.eval_every=6"]
WORDS += ["train.save_every=8", "allocator.interval=4", "train.device=cpu"]


@pytest.fixture(scope="module")
def back() -> Any:
    """``scripts/bench/trackers.py``, which reads back what each tracker has kept."""
    spec = importlib.util.spec_from_file_location("back", Path(__file__).parents[2] / "scripts/bench/trackers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fake:
    """A tracker in memory, which fails at the step that it is told to, or is killed there, or never starts."""

    packages: ClassVar[tuple[str, ...]] = ("json",)
    fails_at: ClassVar[int | None] = None
    killed_at: ClassVar[int | None] = None
    down: ClassVar[bool] = False
    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, *, offline: bool) -> None: ...

    @classmethod
    def check(cls, *, offline: bool) -> None: ...

    def start(self, folder: Path, project: str, name: str, config: Mapping[str, Any], known: str | None) -> str:
        if self.down:
            raise ConnectionError("no server")
        self.calls.append(("start", project, name, config["budget"], known))
        return "seven"

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("the cable was pulled\nand more")
        if step == self.killed_at:
            raise KeyboardInterrupt
        self.calls.append(("log", step, dict(numbers)))

    def close(self, summary: Mapping[str, float], state: str) -> None:
        self.calls.append(("close", summary.get("train/steps"), state))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    module = ModuleType("fake_tracker")
    module.Fake = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_tracker", module)
    monkeypatch.setitem(TRACKERS, "fake", "fake_tracker:Fake")
    monkeypatch.setattr(Fake, "calls", [])
    for name, usual in {"fails_at": None, "killed_at": None, "down": False}.items():
        monkeypatch.setattr(Fake, name, usual)
    return Fake


def series(calls: list[tuple[Any, ...]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for kind, step, numbers in (c for c in calls if c[0] == "log"):
        assert kind == "log"
        for name, value in numbers.items():
            found.setdefault(name, []).append((step, value))
    return found


@pytest.fixture
def interrupted(dora_train: Train, unplugged_at: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """A run whose plug is pulled some steps after its last checkpoint, and its second half."""

    def run(*words: str) -> None:
        from dora_cli.training import loop

        real = loop._Meter.record

        def pull(self: Any, step: int, *args: Any) -> Any:
            record = real(self, step, *args)
            if step == 15:
                raise KeyboardInterrupt
            return record

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Meter, "record", pull)
            assert dora_train(*WORDS, *words) == 130
        assert not (tmp_path / "run" / "summary.json").exists()
        assert dora_train(*WORDS, *words, "resume=true") == 0

    return run


def test_a_resumed_run_goes_on_where_it_was_and_repeats_nothing(
    fake: type[Fake], interrupted: Any, back: Any, tmp_path: Path
) -> None:
    interrupted("track.to=fake", "track.project=mine")
    run = tmp_path / "run"
    starts = [call for call in fake.calls if call[0] == "start"]
    assert starts == [("start", "mine", "run", 0.25, None), ("start", "mine", "run", 0.25, "seven")]
    assert [call[1:] for call in fake.calls if call[0] == "close"] == [(None, "failed"), (24, "finished")]
    timeless = {k: [row for row in v] for k, v in back.expected(run).items() if "per_second" not in k}
    found = {k: v for k, v in series(fake.calls).items() if "per_second" not in k}
    assert found == timeless and {"train/loss", "validation/accuracy", "allocation/alive"} <= found.keys()
    assert sum(name.startswith("ranks/") for name in found) == 12
    assert found["ranks/bert.encoder.layer.0.output.dense"][0] == (3, 4)


def test_a_tracker_that_fails_is_off_and_gets_what_it_missed_on_resume(
    fake: type[Fake], interrupted: Any, back: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fails_at = 9
    real = fake.start

    def mended(self: Fake, *args: Any) -> str:
        fake.fails_at = 9 if args[-1] is None else None
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake, "start", mended)
        interrupted("track.to=[fake]")
    said = [line for line in capsys.readouterr().out.splitlines() if "track.to" in line]
    assert said == ["track.to=fake is off from here on: ConnectionError: the cable was pulled"]
    wanted, found = back.expected(tmp_path / "run"), series(fake.calls)
    assert {k: v for k, v in found.items() if "per_second" not in k} == {
        k: v for k, v in wanted.items() if "per_second" not in k
    }


def session(run: Path, steps: range, *names: str) -> None:
    """A run that goes on from the checkpoint before ``steps`` and says something at each of them."""
    trackers = base.Trackers(
        names, run, project="p", name="n", config={"budget": 1}, offline=True, say=lambda text: None
    )
    past = [record for record in read_metrics(run / "metrics.jsonl") if record["step"] < steps[0]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in past))
    file = MetricsFile(run / "metrics.jsonl", run / "metrics.jsonl", copy=trackers.log)
    with trackers:
        for step in steps:
            file.write({"step": step, "split": "train", "loss": 1.0})
            file.write({"step": step, "split": "validation", "loss": 1.0})


def test_over_many_interruptions_each_record_is_sent_once(fake: type[Fake], tmp_path: Path) -> None:
    def sent_until(last: int) -> None:
        wanted = [(step, [f"{split}/loss"]) for step in range(1, last + 1) for split in ("train", "validation")]
        assert [(call[1], list(call[2])) for call in fake.calls if call[0] == "log"] == wanted

    fake.fails_at = 6
    session(tmp_path, range(1, 11), "fake")
    fake.fails_at, fake.down = None, True
    session(tmp_path, range(9, 16), "fake")  # it does not even start
    sent_until(5)
    fake.down, fake.killed_at = False, 8
    with pytest.raises(KeyboardInterrupt):
        session(tmp_path, range(13, 17), "fake")  # killed while it catches up
    sent_until(7)
    fake.killed_at = None
    session(tmp_path, range(13, 21), "fake")
    session(tmp_path, range(17, 19), "fake")  # killed before it is where it was
    session(tmp_path, range(17, 23), "fake")
    sent_until(22)
    session(tmp_path, range(21, 27))  # left out, twice
    session(tmp_path, range(25, 29))
    sent_until(22)
    session(tmp_path, range(27, 31), "fake")
    sent_until(30)
    assert {call[-1] for call in fake.calls if call[0] == "start"} == {None, "seven"}


@pytest.mark.parametrize(
    "names",
    [
        ("tensorboard",),
        pytest.param(("wandb",), marks=pytest.mark.slow),
        pytest.param(("mlflow", "trackio"), marks=pytest.mark.slow),
    ],
    ids="+".join,
)
def test_each_tracker_keeps_every_number_once(
    names: tuple[str, ...], interrupted: Any, back: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = [name for name in names if find_spec(name)]
    if not installed:
        pytest.skip(f"{' and '.join(names)} are not installed")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "run" / "trackio"))
    interrupted(f"track.to=[{','.join(installed)}]", "offline=true")
    assert not list(cwd.iterdir()), "everything lies in the run folder"
    check(back, tmp_path / "run", installed, timed=False)


def check(back: Any, run: Path, names: list[str], *, timed: bool) -> None:
    """Rates per second of a step that was repeated are those of its first time."""
    wanted = {k: v for k, v in back.expected(run).items() if timed or "per_second" not in k}
    summary = json.loads((run / "summary.json").read_text())
    for name in names:
        found, config = back.READERS[name](run)
        assert back.differences({k: v for k, v in found.items() if timed or "per_second" not in k}, wanted) == [], name
        assert (config["method"], config["budget"], config["train.max_steps"]) == ("dora", "0.25", "24")
        if name != "wandb":  # it keeps a summary beside the series
            assert [v for _, v in found["summary/budget/params_end"]] == [summary["budget"]["params_end"]]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("track.to=wandbb", "did you mean 'wandb'?"),
        ("track.to=[fake,fake]", "no list of different names"),
        ("track.to={a: 1}", "no list of different names"),
        ("track.to=trackio", "pip install 'dora-cli[trackio]'"),
    ],
)
def test_what_cannot_track_is_refused_before_a_model_loads(
    word: str, message: str, dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(base, "find_spec", lambda package: None)
    assert dora_train("budget=r2", word, "model.name=/nowhere") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_is_imported_unasked_and_overwriting_clears_it_all(
    fake: type[Fake], dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "tool", lambda module: pytest.fail(f"{module} was imported"))
    run = tmp_path / "run"
    assert dora_train("method=lora", "budget=r1", "train.max_steps=1", "track.to=fake") == 0
    for name in TRACKERS:
        (run / name).mkdir()
    assert dora_train("method=lora", "budget=r1", "train.max_steps=1", "overwrite=true") == 0
    assert not [path for path in run.iterdir() if path.name in {*TRACKERS, "trackers.json"} - {"fake"}]


def test_a_login_that_fails_is_said_by_the_main_process_alone(
    dora_train: Train, composed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dora_cli.cli import train_run
    from dora_cli.cli.parts import load_parts

    def login(prompt: bool) -> bool:
        raise OSError("the key is no key\nand more")

    module = SimpleNamespace(login=login, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(base, "find_spec", lambda package: module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert dora_train("budget=r2", "track.to=wandb", "model.name=/nowhere") == 2
    said = capsys.readouterr().err
    assert "the key is no key" in said and "WANDB_MODE=offline" in said and "and more" not in said

    class Elsewhere(World):
        def on_main(self, function: Any) -> Any:
            raise InterruptedError

    words = ["recipe=text_classification", "budget=r2", "track.to=wandb", "data.path=/nowhere"]
    with pytest.raises(InterruptedError):
        train_run.run(composed(words, load_parts()), Elsewhere())
