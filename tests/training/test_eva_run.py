"""EVA through the real commands: ranks move first, every low-rank adapter starts so, resume and reload agree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.adapters.init.eva import Eva, RunningPca, _take
from dora_cli.cli import train_run
from dora_cli.training.start import real_tables, real_tokens

Train = Callable[..., int]
SHORT = ["train.max_steps=12", "train.log_every=2", "train.eval_every=6"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every session that the command builds."""
    sessions: list[Any] = []
    real = train_run.build

    def build(*arguments: Any) -> Any:
        sessions.append(real(*arguments))
        return sessions[-1]

    monkeypatch.setattr(train_run, "build", build)
    return sessions


def test_the_preset_moves_ranks_within_the_total_and_learns(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_train("method=eva", "budget=r2", "train.epochs=8") == 0
    summary = read(tmp_path / "run/summary.json")
    ranks = list(summary["ranks"].values())
    assert len(ranks) == 12
    assert sum(ranks) == 24 == summary["budget"]["components_end"] == summary["budget"]["components_start"]
    assert len(set(ranks)) > 1
    assert max(ranks) <= 4  # rho = 2
    text = " ".join(capsys.readouterr().out.split())
    assert f"ranks {min(ranks)} to {max(ranks)}" in text
    assert "adapter.init=eva read" in text
    losses = [r["loss"] for line in (tmp_path / "run/metrics.jsonl").open() if (r := json.loads(line)).get("loss")]
    assert losses[-1] < losses[0]


def test_a_budget_in_parameters_is_not_exceeded(
    dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[list[int]] = []
    real = Eva.observe

    def observe(self: Eva, model: Any, names: Any, ranks: Any, costs: Any, passes: Any) -> list[int]:
        weights.append(costs)
        return real(self, model, names, ranks, costs, passes)

    monkeypatch.setattr(Eva, "observe", observe)
    assert dora_train("method=lora", "budget=1000", *SHORT, f"out={tmp_path}/even") == 0
    assert dora_train("method=eva", "budget=1000", *SHORT, f"out={tmp_path}/eva") == 0
    even, eva = (read(tmp_path / f"{n}/summary.json") for n in ("even", "eva"))
    assert eva["ranks"] != even["ranks"]
    assert eva["budget"]["params_end"] <= even["budget"]["params_end"] <= 1000
    assert dora_train("method=eva", "budget=r2", "dry_run=true") == 0
    assert weights == [[32, 32, 32, 32, 48, 48] * 2, [1] * 12]


@pytest.mark.covering(1)
@pytest.mark.parametrize("alpha", ["null", "4"])
@pytest.mark.parametrize("adapter", ["lora", "components", "svd", "weight_decomposed", "aflora"])
def test_every_low_rank_adapter_starts_as_the_base_and_keeps_alpha_over_the_rank_asked_for(
    adapter: str, alpha: str, dora_train: Train, built: list[Any]
) -> None:
    words = [f"adapter={adapter}", "budget=r2", "dry_run=true", "adapter.init=eva"]
    words += [f"adapter.alpha={alpha}"] if adapter != "aflora" else ["adapter.freeze_square=false"]
    assert dora_train("method=lora", *words) == 0
    session = built[0]
    scale = 1.0 if alpha == "null" else 2.0
    assert len({layer.rank for layer in session.layers.values()}) > 1
    batch = {k: v for k, v in next(session.micro_batches(0))[0].items() if k != "labels"}
    session.model.eval()
    with torch.no_grad():
        adapted = session.model(**batch).logits
        for layer in session.layers.values():
            assert torch.allclose(layer.a @ layer.a.T, torch.eye(layer.rank), atol=1e-5)
            assert getattr(layer, "scale", scale) == pytest.approx(scale, rel=1e-5)
            layer.active = False
        assert torch.allclose(session.model(**batch).logits, adapted, atol=1e-6)


def test_training_mode_and_random_state_are_those_of_a_run_without_eva(dora_train: Train, built: list[Any]) -> None:
    """With rho = 1 no rank moves, and then everything but A is drawn and set as without EVA, the model's modes too."""
    states = []
    for words in (["method=lora"], ["method=eva", "adapter.init_rho=1"]):
        assert dora_train(*words, "budget=r2", "dry_run=true") == 0
        model = built[-1].model
        weights = {k: v for k, v in model.state_dict().items() if not k.endswith(".a")}
        hooks = [n for n, m in model.named_modules() if m._forward_pre_hooks]
        states.append((weights, [m.training for m in model.modules()], hooks, torch.get_rng_state()))
    (w0, modes0, hooks0, rng0), (w1, modes1, hooks1, rng1) = states
    assert w0.keys() == w1.keys()
    assert all(torch.equal(w0[k], w1[k]) for k in w0)
    assert modes0 == modes1
    assert hooks0 == hooks1 == []
    assert torch.equal(rng0, rng1)


def test_padding_and_tokens_without_a_label_are_no_data() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    labels = torch.tensor([[-100, 3, -100], [2, -100, 1]])
    rows = torch.tensor([0, 1])
    labelled = real_tokens({"attention_mask": mask, "labels": labels})
    assert labelled.tolist() == [[False, True, False], [True, False, True]]
    assert torch.equal(real_tokens({"attention_mask": mask, "labels": rows}), mask.bool())
    assert torch.equal(real_tokens({"attention_mask": mask}), mask.bool())
    read, written = real_tables({"attention_mask": mask, "labels": rows, "decoder_attention_mask": mask[:, 1:]})
    assert torch.equal(read, mask.bool()) and torch.equal(written, mask[:, 1:].bool())
    pcas = [RunningPca(2, 3, 0.99, torch.device("cpu")) for _ in range(2)]
    _take(pcas[0], (read, written), torch.randn(2, 3, 3))
    _take(pcas[1], (read, written), torch.randn(4, 3))  # a decoder's positions, flat
    assert [pca.count for pca in pcas] == [5, 3]
    both = real_tables({"attention_mask": mask, "labels": mask, "decoder_attention_mask": mask.flip(1)})
    assert isinstance(both, torch.Tensor) and torch.equal(
        both, torch.tensor([[False, True, False], [True, True, True]])
    )


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["method=eva", "budget=r2"], marks=pytest.mark.slow),
        ["method=eva", "budget=r0.5", "adapter.init_whiten=true"],  # some modules get no adapter at all
        ["method=dora", "budget=r1", "adapter.rank=3", "adapter.init=eva", "schedule.start=2", "schedule.end=9"],
        ["method=aflora", "budget=r2", "adapter.init=eva"],
    ],
    ids=["lora", "bare", "components", "aflora"],
)
def test_resuming_gives_the_same_bits(
    words: list[str], dora_train: Train, tmp_path: Path, unplugged: Callable[..., None]
) -> None:
    words = [*words, *SHORT, "train.save_every=5"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(5, *words, f"out={tmp_path}/cut")
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first, second = (load_file(run / "adapter/adapter_model.safetensors") for run in (whole, cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read(whole / "summary.json")["ranks"] == read(cut / "summary.json")["ranks"]


def test_eval_of_run_adapter_and_merged_gives_the_runs_numbers(dora_train: Train, tmp_path: Path) -> None:
    from dora_cli.cli.eval import main as dora_eval
    from dora_cli.cli.merge import main as dora_merge

    assert dora_train("method=eva", "budget=r0.5", "adapter.alpha=4", "train.epochs=3") == 0
    run, merged = tmp_path / "run", tmp_path / "merged"
    summary = read(run / "summary.json")
    ranks = list(summary["ranks"].values())
    assert sum(ranks) == 6
    assert any(ranks[6:]), "also modules that an even spread leaves out may get a component"
    assert dora_merge([f"checkpoint={run}", f"out={merged}"]) == 0
    for checkpoint, extra in ((run, []), (run / "adapter", []), (merged, [f"recipe={run}/config.yaml"])):
        out = tmp_path / f"eval-{checkpoint.name}"
        assert dora_eval([f"checkpoint={checkpoint}", f"out={out}", *extra]) == 0
        found = read(out / "eval-validation.json")["metrics"]
        assert found["loss"] == pytest.approx(summary["metrics"]["validation"]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["adapter.init_rho=2"], "adapter.init_rho=2.0: adapter.init=default does not read it"),
        (["adapter.init_whiten=true"], "adapter.init_whiten=True: adapter.init=default does not read it"),
        (["adapter.init=evaa"], "adapter.init=evaa is not known"),
        (["adapter.init=eva", "adapter.init_rho=0.5"], "adapter.init_rho"),
        (["adapter.init=eva", "adapter.init_tolerance=0"], "adapter.init_tolerance"),
        (["adapter=mora_components", "adapter.init=eva"], "adapter.init=eva needs rows, which adapter=mora_components"),
        (["method=bitfit", "adapter.init=eva"], "adapter.init"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_loads(
    words: list[str],
    says: str,
    dora_train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dora_cli.training.setup.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert dora_train("method=lora", "budget=r2", *words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_look_reads_the_training_rows_of_the_first_epoch_once(
    dora_train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_rows: list[int] = []
    real = Eva.observe

    def observe(self: Eva, model: Any, names: Any, ranks: Any, costs: Any, passes: Any) -> list[int]:
        def counted() -> Any:
            for tokens, forward in passes:
                read_rows.append(len(tokens))
                yield tokens, forward

        return real(self, model, names, ranks, costs, counted())

    monkeypatch.setattr(Eva, "observe", observe)
    assert dora_train("method=eva", "adapter.init_tolerance=1", "budget=r2", "dry_run=true") == 0
    assert read_rows == [8] * 12
