"""Plans for models whose weights are not here: exact counts from shapes alone, and on how many devices they fit."""

from dataclasses import replace
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from dora_cli.cli.parts import load_parts
from dora_cli.config.compose import compose
from dora_cli.errors import UserError
from dora_cli.models.names import resolve_name
from dora_cli.models.skeleton import can_hold, skeleton
from dora_cli.training.fits import Base, fits, frozen_base, need
from dora_cli.training.memory import MemoryEstimate, estimate
from dora_cli.training.plan import describe
from dora_cli.training.setup import Session, build

GIB = 2**30
# layers, width, inner, heads, key-value heads, vocabulary, tied → parameters as published
LLAMAS = {
    (16, 2048, 8192, 32, 8, 128256, True): 1_235_814_400,
    (28, 3072, 8192, 24, 8, 128256, True): 3_212_749_824,
    (32, 4096, 14336, 32, 8, 128256, False): 8_030_261_248,
    (80, 8192, 28672, 64, 8, 128256, False): 70_553_706_496,
}
QWENS = {(28, 2048, 6144, 16, 8, 151936, True): 1_720_574_976, (36, 4096, 12288, 32, 8, 151936, False): 8_190_735_360}


def settings(kind: type, shape: tuple) -> LlamaConfig:
    layers, width, inner, heads, kv, words, tied = shape
    head = {"head_dim": 128} if kind is Qwen3Config else {}
    return kind(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=words,
        tie_word_embeddings=tied,
        dtype="bfloat16",
        **head,
    )


@pytest.mark.parametrize(
    ("kind", "shape", "published"),
    [(LlamaConfig, *item) for item in LLAMAS.items()] + [(Qwen3Config, *item) for item in QWENS.items()],
    ids=lambda value: f"{value:,}" if isinstance(value, int) else "",
)
def test_shapes_alone_give_the_published_counts(kind, shape, published) -> None:
    # Layers are alike: two small models say what each adds, in a tenth of the time.
    few = [skeleton(AutoModelForCausalLM, settings(kind, (n, *shape[1:])), True, False) for n in (1, 2)]
    one, two = (sum(p.numel() for p in model.parameters()) for model in few)
    assert one + (two - one) * (shape[0] - 1) == published
    base = frozen_base(few[1].requires_grad_(False))
    buffers = sum(b.nbytes for b in few[1].buffers())  # of rotary positions
    assert base == Base(whole=2 * two + buffers, layer=2 * (two - one), outside=2 * (2 * one - two) + buffers)
    packed = frozen_base(few[1], "bnb_nf4")
    norms = 2 * shape[1] + (256 if kind is Qwen3Config else 0)
    assert packed.layer == pytest.approx(2 * norms + 0.516 * (two - one - norms), rel=1e-3)
    assert packed.outside == base.outside


@pytest.fixture
def hollow_dir(model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model without its weights."""
    return Path(copytree(model_dir, tmp_path / "hollow", ignore=ignore_patterns("*.safetensors")))


def session_of(folder: Path, data_dir: Path, *overrides: str) -> Session:
    words = [f"model.name={folder}", f"data.path={data_dir}", "data.max_length=16", "train.device=cpu", "budget=r4"]
    words += ["recipe=text_classification", "train.batch_size=32", "train.eval_batch_size=1", *overrides]
    return build(compose([*words, "dry_run=true"], load_parts()))


@pytest.mark.parametrize(
    "options",
    [pytest.param(["method=dora"], marks=pytest.mark.slow), ["method=lora", "train.precision=bf16"]],
    ids=" ".join,
)
def test_without_weights_the_plan_says_the_same(options, model_dir, hollow_dir, data_dir) -> None:
    with_weights, without = (session_of(folder, data_dir, *options) for folder in (model_dir, hollow_dir))
    assert (with_weights.hollow, without.hollow) == (False, True)
    assert with_weights.head_modules == without.head_modules
    plans = [describe(session, "out").sections for session in (with_weights, without)]
    for section in ("adapter", "schedule", "training", "examples"):
        assert plans[0].get(section) == plans[1].get(section)
    assert plans[0]["model"]["targets"] == plans[1]["model"]["targets"]
    assert plans[0]["model"]["base"].split(", ")[1] == plans[1]["model"]["base"].split(", ")[1]
    assert any("planned from their shapes" in note for note in plans[1]["note"].values())
    one, other = estimate(with_weights), estimate(without)
    assert (one.base, one.trained) == (other.base, other.trained)
    assert other.step == pytest.approx(one.step, rel=0.01)


@pytest.mark.slow
def test_many_layers_are_reckoned_from_a_few(hollow_dir, data_dir, monkeypatch) -> None:
    config = AutoConfig.from_pretrained(hollow_dir)
    config.num_hidden_layers = 6
    config.save_pretrained(hollow_dir)
    session = session_of(hollow_dir, data_dir, "method=lora")
    followed = estimate(session)
    monkeypatch.setattr("dora_cli.training.memory.DEEP", 5)
    reckoned = estimate(session)
    assert reckoned.trained == followed.trained
    assert reckoned.step == pytest.approx(followed.step, rel=0.01)


def test_a_run_still_asks_for_weights(hollow_dir, tmp_path) -> None:
    with pytest.raises(UserError, match="no safetensors weights"):
        resolve_name(str(hollow_dir))
    assert resolve_name(str(hollow_dir), weights=False) == str(hollow_dir.resolve())
    assert not can_hold(str(hollow_dir), None)
    (hollow_dir / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="only pickled ones"):
        resolve_name(str(hollow_dir), weights=False)


def test_weights_larger_than_memory_are_not_read(hollow_dir, monkeypatch) -> None:
    with (hollow_dir / "model.safetensors").open("wb") as file:
        file.truncate(10**6)
    assert can_hold(str(hollow_dir), None)
    monkeypatch.setattr("dora_cli.models.skeleton.machine_memory", lambda: 10**6)
    assert not can_hold(str(hollow_dir), None)


def test_what_each_device_needs() -> None:
    base = Base(whole=80 * GIB, layer=GIB, outside=2 * GIB)
    found = MemoryEstimate(
        "cuda", 0, 80 * GIB, 2 * GIB, 16 * GIB, 0, 8, 512, "training", step=16 * GIB, evaluation=3 * GIB
    )
    assert need(found, base, 8, 1, sharded=False) == 98 * GIB
    assert need(found, base, 8, 4, sharded=False) == 86 * GIB  # a quarter of the rows
    assert need(found, base, 8, 8, sharded=False) == 85 * GIB  # an evaluation needs 3 in each
    # a quarter of the base, what lies outside the layers, two layers, what trains, a quarter of the rows
    assert need(found, base, 8, 4, sharded=True) == (20 + 2 + 2 + 2 + 4) * GIB
    assert need(found, base, 6, 4, sharded=True) == need(found, base, 8, 4, sharded=True) + round(16 * GIB / 12)
    assert fits(found, base, 8) == {
        "24 GB": "8 devices, train.shard=full (19.0 GiB each)",
        "40 GB": "4 devices, train.shard=full (30.0 GiB each)",
        "48 GB": "4 devices, train.shard=full (30.0 GiB each)",
        "80 GB": "2 devices, train.shard=full (54.0 GiB each)",
        "141 GB": "1 device (98.0 GiB each)",
    }
    frugal = replace(found, step=2 * GIB, evaluation=0)
    assert "shard" not in str(fits(found, replace(base, splits=False), 8)), "packed weights can't be"
    short = "(of train.batch_size={} each needs a row)"
    assert fits(found, base, 2, frugal)["40 GB"] == "more than 2 devices " + short.format(2)
    assert fits(found, base, 4, frugal)["24 GB"] == "more than 4 devices " + short.format(4)
    one = "more than 1 device " + short.format(1)
    assert fits(found, replace(base, whole=40 * GIB), 1, frugal)["24 GB"] == one
    text = fits(replace(found, base=10 * GIB), Base(10 * GIB, GIB, GIB), 1, replace(frugal, base=10 * GIB))["24 GB"]
    assert text == one + "; by train.gradient_checkpointing=true 1 device (14.0 GiB each)"
