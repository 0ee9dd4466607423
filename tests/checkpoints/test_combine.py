"""Several adapters as one: the sums against dense ones in float64 and PEFT's, and a merge of them end to end."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import peft.utils.merge_utils as peft_merging
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_cli.adapters.mora import rotation_delta
from dora_cli.checkpoints.adapter_format import LowRank, Square, WeightDecomposed, write_full
from dora_cli.checkpoints.deltas import Combination, Deltas, delta_rows, smallest_kept
from dora_cli.checkpoints.merge import merge
from dora_cli.cli.merge import main
from dora_cli.config import record
from dora_cli.errors import UserError

MakeCase = Callable[..., Any]  # tests/checkpoints/conftest.py
CLOSE = {"rtol": 0, "atol": 2e-6}  # float32 products of rank 4 with entries below 2


def blocks(rows: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def pair(d_out: int, d_in: int, rank: int, seed: int, transposed: bool = False) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank("m", torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw), transposed)


def dense(update: LowRank | Square) -> Tensor:
    """ΔW as its weight is stored, float64 from the float32 product: which elements are kept hangs on its last bit."""
    delta = rotation_delta(update.m, *update.shape) if isinstance(update, Square) else update.b @ update.a
    return (delta.T if update.transposed else delta).double()


def together(updates: list[Any], how: str, step: int = 3, **options: Any) -> Tensor:
    chosen = Combination(how, options.pop("weights", (1.0,) * len(updates)), **options)
    rows = dense(updates[0]).shape[0]
    return torch.cat(list(Deltas("m", list(enumerate(updates)), chosen).rows(blocks(rows, step))))


UPDATES = [
    [pair(7, 12, 2, 0), pair(7, 12, 4, 1), pair(7, 12, 1, 2)],
    [pair(8, 8, 3, 3, True), Square("m", torch.randn(4, 4, generator=torch.Generator().manual_seed(4)), (8, 8), True)],
]


@pytest.mark.parametrize("updates", UPDATES)
def test_linear_is_the_weighted_sum(updates: list[Any]) -> None:
    weights = (0.7, -0.3, 2.0)[: len(updates)]
    expected = sum(w * dense(update) for w, update in zip(weights, updates, strict=True))
    torch.testing.assert_close(together(updates, "linear", weights=weights).double(), expected, **CLOSE)


@pytest.mark.parametrize("updates", UPDATES)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.99, 1.0])
def test_ties_is_the_papers_three_steps_and_pefts(density: float, updates: list[Any]) -> None:
    trimmed = []
    for delta in map(dense, updates):
        limit = delta.abs().flatten().sort(descending=True).values[: int(density * delta.numel())]
        trimmed.append(torch.where(delta.abs() >= limit[-1], delta, 0.0))
    expected = torch.zeros_like(trimmed[0])
    for i, j in product(*map(range, expected.shape)):  # trim, elect, mean: element by element, as it is printed
        values = [float(delta[i, j]) for delta in trimmed]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        expected[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0
    got = together(updates, "ties", density=density)
    torch.testing.assert_close(got.double(), expected, **CLOSE)
    weights = [0.7, 0.3, 1.5][: len(updates)]
    theirs = peft_merging.ties([dense(update) for update in updates], torch.tensor(weights).double(), density)
    got = together(updates, "ties", density=density, weights=tuple(weights))
    torch.testing.assert_close(got.double(), theirs, **CLOSE)


def test_the_limit_is_the_exact_order_statistic() -> None:
    torch.manual_seed(0)
    low = torch.randn(9, 14)
    for delta in (low, low.round(), low * 1e-30, torch.zeros(9, 14), low.where(low > 0, 0.0)):
        ordered = delta.abs().flatten().sort(descending=True).values
        for density in (0.001, 0.02, 0.3, 0.9, 1.0):
            k = int(density * delta.numel())
            limit = smallest_kept(lambda block, delta=delta: delta[block], blocks(9, 4), density)
            assert limit == (float("inf") if k == 0 else 0.0 if k == delta.numel() else float(ordered[k - 1]))


def test_dare_keeps_a_random_share_and_scales_it_up() -> None:
    update, density = pair(40, 60, 3, 5), 0.3
    delta = dense(update)
    got = together([update], "dare_linear", density=density, seed=2).double()
    kept = got != 0
    torch.testing.assert_close(got[kept], delta[kept] / density, rtol=0, atol=5e-6)  # blocks differ in the last bit
    # 2400 draws: five standard deviations of the share are 5 √(0.3 · 0.7 / 2400) = 0.047
    assert abs(float(kept.double().mean()) - density) < 0.047
    torch.testing.assert_close(together([update], "dare_linear", density=1.0), update.b @ update.a, **CLOSE)


def test_dare_draws_by_seed_weight_and_adapter_whatever_the_blocks() -> None:
    updates = [pair(10, 6, 2, 6), pair(10, 6, 2, 6)]  # twins
    chosen = Combination("dare_linear", (1.0, 1.0), 0.5)

    def mask(place: int = 0, name: str = "m", seed: int = 1, step: int = 10) -> list[bool]:
        deltas = Deltas(name, [(place, updates[0])], replace(chosen, seed=seed))
        return (torch.cat(list(deltas.rows(blocks(10, step)))) != 0).flatten().tolist()

    assert mask() == mask(step=1) == mask(step=7)
    assert mask() not in (mask(place=1), mask(name="n"), mask(seed=2))
    alone = [Deltas("m", [(place, updates[0])], chosen) for place in (0, 1)]
    parts = [next(iter(deltas.rows([slice(0, 10)]))) for deltas in alone]
    torch.testing.assert_close(together(updates, "dare_linear", density=0.5), parts[0] + parts[1], **CLOSE)
    positive, count = parts[0] + parts[1] >= 0, (parts[0] != 0).float() + (parts[1] != 0)
    assert positive.any() and not positive.all()  # twins agree in sign wherever both are kept
    torch.testing.assert_close(
        together(updates, "dare_ties", density=0.5), (parts[0] + parts[1]) / count.clamp(min=1), **CLOSE
    )


# a merge


@pytest.fixture
def two(make_case: MakeCase, tmp_path: Path) -> Any:
    """A language model and two adapters of it, each of modules that the other does not have too."""
    case = make_case("llama")
    plain: dict[str, Any] = {"head": {}, "head_modules": [], "task_type": "CAUSAL_LM", "method": {}}
    case.write(tmp_path / "a", **plain)
    case.other = [pair(*update.shape, (i + 1) % 3, i) for i, update in enumerate(case.updates)]
    case.other = [replace(new, name=update.name) for new, update in zip(case.other, case.updates, strict=True)]
    case.write(tmp_path / "b", modules=case.other, **plain)
    case.folders = [tmp_path / "a", tmp_path / "b"]
    return case


@pytest.mark.parametrize("how", ["linear", "ties", "dare_ties"])
def test_a_merge_of_two_adds_their_combination(
    how: str, two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"combine": how, "weights": [0.7, 0.4]} | ({} if how == "linear" else {"density": 0.4})
    report = merge(two.folders, tmp_path / "out", **options)
    before, after = (load_file(folder / "model.safetensors") for folder in (two.base, tmp_path / "out"))
    assert before.keys() == after.keys()
    for update, other in zip(two.updates, two.other, strict=True):
        held = [(place, one) for place, one in enumerate((update, other)) if one.rank]
        assert report.ranks.get(update.name, 0) == sum(one.rank for _, one in held)
        name = f"{update.name}.weight"
        if not held:
            assert torch.equal(before[name], after[name])
            continue
        added = Deltas(update.name, held, Combination(how, (0.7, 0.4), options.get("density", 1.0)))
        whole = next(iter(added.rows([slice(0, len(before[name]))])))
        torch.testing.assert_close(after[name].double(), before[name].double() + whole.double(), **CLOSE)
    made_of = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert made_of["how"] == how and made_of["weights"] == [0.7, 0.4] and len(made_of["adapters"]) == 2
    monkeypatch.setattr("dora_cli.checkpoints.weights.BLOCK", 37)
    merge(two.folders, tmp_path / "blocks", **options)
    for name, tensor in load_file(tmp_path / "blocks" / "model.safetensors").items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=1e-6)


def test_the_head_is_that_of_the_one_that_has_it_or_was_chosen(two: Any, tmp_path: Path) -> None:
    two.write(tmp_path / "c")  # with a head
    merge([*two.folders, tmp_path / "c"], tmp_path / "out", combine="linear")
    model = two.load_merged(tmp_path / "out")
    torch.testing.assert_close(model.score.weight, two.head["score.weight"], rtol=0, atol=0)
    two.write(tmp_path / "d", head={"score.weight": two.head["score.weight"] + 1})
    both = [tmp_path / "c", tmp_path / "d"]
    with pytest.raises(UserError, match="have a head or tokens of their own") as caught:
        merge(both, tmp_path / "no", combine="linear")
    assert f"heads_from={both[0]}" in str(caught.value.hint)
    merge(both, tmp_path / "chosen", combine="linear", heads_from=str(both[1]))
    torch.testing.assert_close(
        two.load_merged(tmp_path / "chosen").score.weight, two.head["score.weight"] + 1, rtol=0, atol=0
    )


def test_the_command_says_what_was_combined(two: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"checkpoint=[{two.folders[0]}, {two.folders[1]}]", f"out={tmp_path / 'out'}", "density=0.4", "seed=3"]
    assert main([*words, "combine=dare_ties", "weights=[1,0.5]"]) == 0
    told = capsys.readouterr().out
    assert "2 adapters, dare_ties, density 0.4, seed 3" in told
    assert f"           0.5 × {two.folders[1]}" in told and "together" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing says how they become one"),
        (["combine=sum"], "unknown combine 'sum'"),
        (["combine=linear", "weights=[1]"], "1 weights for 2 adapters"),
        (["combine=linear", "weights=[1,x]"], "'x' is no number"),
        (["combine=linear", "weights=[1,nan]"], "finite"),
        (["combine=linear", "weights=[1,1e39]"], "finite numbers of float32"),
        (["combine=linear", "weights=[1,1e10]", "dtype=float16"], "too large for float16"),
        (["combine=ties", "weights=[3e38,3e38]"], "would hold numbers that are not finite"),
        (["combine=linear", "density=0.5"], "no meaning with combine=linear"),
        (["combine=ties", "seed=1"], "draws nothing"),
        (["combine=ties", "density=0"], "no share of elements"),
        (["combine=dare_linear", "seed=1.5"], "no whole number"),
        (["combine=linear", "heads_from=c"], "none of the adapters"),
    ],
)
def test_a_mistake_is_one_message(
    words: list[str], message: str, two: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = f"checkpoint=[{','.join(map(str, two.folders))}]"
    assert main([both, f"out={tmp_path / 'out'}", *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_adapters_that_do_not_add_up_are_refused(two: Any, tmp_path: Path) -> None:
    def refused(message: str, write: Callable[[Path], object], **options: Any) -> None:
        write(tmp_path / message)
        with pytest.raises(UserError, match=message):
            merge([two.folders[0], tmp_path / message], tmp_path / "out", combine="linear", **options)

    plain: dict[str, Any] = {"head": {}, "head_modules": [], "task_type": None}
    refused("name different bases", lambda folder: two.write(folder, base_name="other/model", **plain))
    wider = [replace(pair(5, 9, 1, 0), name=two.folders and next(u.name for u in two.updates if u.rank))]
    refused("are of different bases", lambda folder: two.write(folder, modules=wider, **plain))
    config = two.method | {"model_config": {"hidden_size": 99}}
    named = {"base_name": "other/model", "method": config}
    refused("hidden_size 99", lambda folder: two.write(folder, **named, **plain), base=str(two.base))
    scaled = [WeightDecomposed(u.name, u.a, u.b, magnitude=torch.ones(len(u.b))) for u in two.updates]
    refused("has no ΔW of its own", lambda folder: two.write(folder, modules=scaled, **plain))
    whole = {"head_modules": [], "base_name": str(two.base), "task_type": None, "method": {}}
    refused("holds whole parameters", lambda folder: write_full(folder, {"x": torch.ones(2)}, **whole))
    packed = two.method | {"quantization": {"kind": "bnb_nf4"}}
    refused("differently packed", lambda folder: two.write(folder, method=packed, **plain))
    assert not (tmp_path / "out").exists()


def test_one_adapter_may_be_weighed(two: Any, tmp_path: Path) -> None:
    merge(two.folders[0], tmp_path / "out", combine="linear", weights=[0.5])
    before, after = (load_file(folder / "model.safetensors") for folder in (two.base, tmp_path / "out"))
    for update in two.updates:
        expected = before[f"{update.name}.weight"] + 0.5 * delta_rows(update)(slice(None))
        torch.testing.assert_close(after[f"{update.name}.weight"], expected, **CLOSE)


def test_a_body_and_a_model_name_the_same_modules(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")  # saved from the bare body: PEFT's adapters of that have its names, ours a prefix more
    case.write(tmp_path / "ours")
    bare = [replace(update, name=update.name.removeprefix("bert.")) for update in case.updates]
    options: dict[str, Any] = {"head": {}, "head_modules": [], "task_type": None, "method": {}}
    case.write(tmp_path / "theirs", modules=bare, **options)
    for order in (["ours", "theirs"], ["theirs", "ours"]):
        merge([tmp_path / name for name in order], tmp_path / order[0] / "out", combine="linear", weights=[0.25, 0.75])
        model = case.load_merged(tmp_path / order[0] / "out")
        torch.testing.assert_close(case.logits(model), case.logits(case.dense()), rtol=0, atol=1e-5)


def test_the_card_has_the_task_of_the_one_with_the_head_and_the_data_of_all(
    two: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data, task in (("e", "org/texts", "clm"), ("c", "org/labels", "classification")):
        two.write(tmp_path / name / "adapter", **({"head": {}, "head_modules": []} if name == "e" else {}))
        text = record.write("x", {}, {"data": {"name": data, "path": None, "task": task}})
        (tmp_path / name / "config.yaml").write_text(text)
        (tmp_path / name / "summary.json").write_text("{}")
    both = f"checkpoint=[{tmp_path / 'e'},{tmp_path / 'c'}]"
    assert main([both, f"out={tmp_path / 'out'}", "combine=linear"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card and "pipeline_tag: text-classification" in card
    assert "datasets:\n- org/labels\n- org/texts\n" in card
