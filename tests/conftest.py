"""Shared by all rooms: small adapted stacks of linear layers, a tiny pretrained BERT with a sentiment set it can learn,
and one thread, since tiny tensors gain from no more.
"""

import importlib.util
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dora_cli.adapters.base import AdapterLayer
from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import inject
from dora_cli.adapters.part import LowRankPart

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

Stack = tuple[nn.Module, dict[str, AdapterLayer]]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``covering(n)`` the cases in which every n values meet stay fast, the others get slow.

    ``covering(1)`` keeps every value of every parameter (params of fixtures too) at least once, ``covering(2)`` every
    pair of values. Chosen greedily: the case that adds most, of those the one whose values and pairs are rarest so far.
    """

    def small(held: list[tuple[str, str]]) -> list[Any]:
        return [*held, *combinations(held, 2)]

    tests: dict[Any, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("covering"):
            tests[item.function].append(item)
    for cases in tests.values():
        mark = cases[0].get_closest_marker("covering")
        assert mark is not None
        n = mark.args[0]
        values = {case: [(k, repr(v)) for k, v in sorted(case.callspec.params.items())] for case in cases}
        missing = {together for held in values.values() for together in combinations(held, n)}
        used: Counter[Any] = Counter()
        while missing:
            adds = {case: len(missing.intersection(combinations(values[case], n))) for case in cases}
            known = {case: sum(used[value] for value in small(values[case])) for case in cases}
            chosen = max(cases, key=lambda case: (adds[case], -known[case]))
            missing.difference_update(combinations(values[chosen], n))
            used.update(small(values[chosen]))
            cases.remove(chosen)
        for case in cases:
            case.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a run keeps for the next one (tokens) stays out of the user's home, and nobody waits for the disk.

    A run asks some hundred times that what it wrote has reached the disk; no test could tell, short of a power cut.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _no_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing report.html takes a second, longer than most of the runs here; tests marked ``pages`` look at it."""
    if not request.node.get_closest_marker("pages"):
        from dora_cli.cli import train_run

        monkeypatch.setattr(train_run, "write_report", lambda run, path: None)


@pytest.fixture
def stack() -> Callable[..., Stack]:
    """Build ``n`` linear layers with tanh between, adapted, c, b shaken so that nothing is zero by accident."""

    def make(
        n: int = 4,
        width: int = 16,
        rank: int = 6,
        part: LowRankPart | None = None,
        *,
        seed: int = 0,
        shake: bool = True,
    ) -> Stack:
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for _ in range(n):
            modules += [nn.Linear(width, width), nn.Tanh()]
        model = nn.Sequential(*modules)
        model.requires_grad_(False)
        layers = inject(model, [str(2 * i) for i in range(n)], part or Components(), [rank] * n)
        if shake:
            with torch.no_grad():
                for layer in layers.values():
                    for parameter in layer.adapter_parameters().values():
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        return model, layers

    return make


@pytest.fixture(scope="session")
def tiny() -> Any:
    """``scripts/faults/tiny.py``, which makes the model and the data."""
    return _file(Path(__file__).parents[1] / "scripts" / "faults" / "tiny.py")


@pytest.fixture(scope="session")
def tiny_models() -> Any:
    """``tests/tiny_models.py``: every architecture, tiny."""
    return _file(Path(__file__).with_name("tiny_models.py"))


@pytest.fixture(scope="session")
def model_dir(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.make_model(tmp_path_factory.mktemp("model"))
    return folder


@pytest.fixture(scope="session")
def data_dir(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.make_data(tmp_path_factory.mktemp("data"))
    return folder


@pytest.fixture(scope="session")
def save_decoder() -> Callable[..., Path]:
    """Save a small decoder with tied embeddings and a tokenizer of whole words, which lie between spaces."""

    def save(
        folder: Path, words: list[str], template: str | None, kind: str = "Llama", dtype: Any = torch.float32
    ) -> Path:
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers

        special = ["<pad>", "<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
        vocabulary = {word: i for i, word in enumerate([*special, *words])}
        rust = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=rust, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
        )
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        ids = {"vocab_size": len(vocabulary), "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
        # Frozen words must differ, or nothing can be said.
        made = getattr(transformers, f"{kind}Config")(**shape, **heads, **ids, initializer_range=0.4)
        model = getattr(transformers, f"{kind}ForCausalLM")(made)
        model.to(dtype).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def composed() -> Callable[..., Any]:
    """``compose``, which gives for the same words what it gave before; it takes half of a tiny run's time.

    What speaks of one start alone (``out``, ``resume``, …) is set afterwards, as the composition would. Users' own
    files may change between two calls, so that what is made of them is composed each time, as is ``hub.…``, which is
    refused by itself.
    """
    from dora_cli.config.compose import compose
    from dora_cli.config.record import NOT_REPEATED

    known: dict[tuple[str, ...], Any] = {}
    truth = {"true": True, "false": False, "null": None}

    def again(words: Sequence[str], parts: Any, config_dirs: Sequence[str] = ()) -> Any:
        start = {k: truth.get(v, v) for k, _, v in (w.partition("=") for w in words) if k in NOT_REPEATED}
        afresh = any(w.startswith("hub.") or (w.startswith("recipe=") and ("/" in w or "." in w)) for w in words)
        if config_dirs or afresh or start.keys() >= {"resume", "overwrite"} or str(start.get("out"))[:1] in "~'\"":
            return compose(words, parts, config_dirs)
        key = tuple(w for w in words if w.partition("=")[0] not in NOT_REPEATED)
        if key not in known:
            known[key] = compose(key, parts)
        copy = deepcopy(known[key])
        for name, value in start.items():
            assert isinstance(value, bool) or name in ("out", "dry_run", "push_to_hub"), f"{name}={value}"
            setattr(copy.config, name, value)
        return copy

    return again


@pytest.fixture
def remember_compositions(composed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands compose through ``composed``."""
    from dora_cli.cli import eval_run  # noqa: F401 - keeps the real one
    from dora_cli.config import compose

    monkeypatch.setattr(compose, "compose", composed)


class Unplugged(BaseException):
    """The plug is pulled."""


@pytest.fixture
def unplugged_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """A context in which a training run ends with no word as soon as its checkpoint at a step is written."""

    @contextmanager
    def unplug(step: int) -> Iterator[None]:
        from dora_cli.cli import train_run

        real = train_run.save_checkpoint

        def save(folder: Path, at: int, *args: Any, **kwargs: Any) -> Path:
            path = real(folder, at, *args, **kwargs)
            if at == step:
                raise Unplugged
            return path

        with monkeypatch.context() as patch, pytest.raises(Unplugged):
            patch.setattr(train_run, "save_checkpoint", save)
            yield

    return unplug


def _file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
