"""What cannot work is refused with one clear message, exit code 2, before a model or data is looked for."""

import re
from pathlib import Path

import pytest

from dora_cli.cli.train import main

NOWHERE = ["recipe=text_classification", "model.name=/nowhere", "data.path=/nowhere"]


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["method=increlora", "budget=0.1"], "is a share of the starting components", "adapter.rank"),
        (["method=increlora", "budget=0.1", "adapter.rank=10"], "budget=0.1 is no more than the adapter", "raise"),
        (["method=increlora", "budget=r1"], "budget=r1 is no more than the adapter starts with", "raise the budget"),
        (["method=increlora", "budget=r4", "allocator.start_rank=4"], "allocator.start_rank=4", "raise the budget"),
        (["method=dora", "budget=r12", "adapter.rank=8"], "budget=r12 asks for more than the adapter", "adapter.rank"),
        (["method=dora", "budget=r0.5", "allocator.min_rank=1"], "each must keep 1 at least", "raise the budget"),
        (["method=bayesian_lora", "budget=r0.5"], "budget=r0.5 keeps 0.5 components a module", "raise the budget"),
        (["method=bayesian_lora", "budget=0.05", "adapter.rank=12"], "keeps 0.6 components a module", "raise"),
        (["method=sora", "budget=r2", "allocator.threshold=1e-3"], "would close every gate", "allocator.threshold"),
        (["method=mora", "budget=r2", "export=uniform"], "export=uniform: the update of method=mora", "dora-merge"),
        (["method=full", "export=uniform"], "export=uniform: the update of method=full", "save.merged=true"),
        (
            ["method=mora", "budget=r2", "importance=component_norm", "allocator=prune", "schedule=linear"],
            "adapter=mora importance=component_norm do not go together",
            "adapter=mora_components",
        ),
        (["method=lora", "budget=r2", "adapter.init_rho=2"], "adapter.init_rho=2.0: adapter.init=default", "eva"),
        (["method=lora", "budget=r2", "adapter.init=evaa"], "adapter.init=evaa is not known", "did you mean 'eva'"),
        (["method=mora_components", "budget=r2", "adapter.init=eva"], "adapter.init=eva needs rows", "default"),
        (["method=lora", "budget=r2", "adapter.init=open_gates"], "adapter.init=open_gates needs gates", "default"),
        (["method=dora", "budget=r2", "adapter.init=eva", "adapter.init_from=x"], "both say where", "set one of them"),
        (["method=adalora_official", "budget=340k"], "prune_peft counts components", "budget=r4"),
        (["method=dora_official", "budget=340k"], "prune_official counts components", "budget=r4"),
        (["method=dora_official", "budget=r2", "schedule.start=0.5"], "needs schedule.start=0.5 before", "prune"),
        (["method=rslora", "budget=r2", "adapter.alpha=null"], "alpha=null is scale 1", "set adapter.alpha"),
        (["method=dora", "budget=r2", "adapter.scaling=standard"], "components does not read it", "read by lora"),
        (["method=elalora", "budget=r2", "schedule=linear"], "keeps one total throughout", "schedule=constant"),
        (["method=dlora", "budget=r2", "schedule=constant"], "follows a schedule", "cubic_late"),
        (["method=dora", "budget=r2", "schedule=constant"], "follows a schedule", "cubic_late"),
        (["method=lora", "budget=r2", "schedule=cosine"], "acts on nothing", "schedule=constant"),
        (["method=lora", "budget=r2", "importance=gate_size"], "needs gates, which this adapter", "importance="),
        (["method=dlora", "budget=r2", "importance=component_norm"], "do not go together", "displacement"),
        (["method=dlora", "budget=r2", "regularizer=dem"], "regularizer=dem do not go together", "regularizer=none"),
        (["method=sora", "budget=r2", "schedule.start=0.2"], "one_shot does not read it", "schedule.start is read by"),
        (["method=lora", "budget=r2", "adapter.init_from=/nowhere"], "there is no folder /nowhere", ""),
        (
            ["method=bayesian_lora", "budget=r2", "adapter.rank=4", "regularizer.target_rank=20"],
            "regularizer.target_rank=20 lies above the start",
            "adapter.rank",
        ),
        (
            ["method=bayesian_lora", "budget=r2", "adapter=components"],
            "importance=gate_probability needs gate_probability",
            "importance=component_norm or fisher or gate_size or energy or gradient or module_sensitivity or "
            "sensitivity or ablation or random or none",
        ),
        (["method=full", "model.quantization=bnb_nf4"], "adapter=full does not go with a quantised base", "lora"),
        (["method=bitfit", "model.quantization=ao_int8"], "adapter=bitfit does not go with a quantised", "components"),
        (
            ["method=bayesian_lora", "budget=r2", "model.quantization=bnb_int8"],
            "adapter=gated does not go with a quantised base (model.quantization=bnb_int8)",
            "take a base that is not quantised",
        ),
        (["method=lora", "budget=r2", "model.quantization=nf4"], "quantization=nf4 is not offered", "did you mean"),
        (["method=dora"], "method=dora works towards a budget", "budget=r8"),
        (["method=dora", "budget=r2", "schedule=auto"], "budget=r2 and schedule=auto contradict", "schedule.floor=N"),
        (["method=dora", "schedule=auto"], "nothing says how large the adapter starts", "adapter.rank=12"),
        (
            ["method=increlora", "schedule=auto"],
            "allocator=grow and schedule=auto do not go together",
            "allocator=prune",
        ),
        (["method=sora", "schedule=auto"], "allocator=soft_threshold and schedule=auto do not", "allocator=prune"),
        (["method=elalora", "schedule=auto"], "keeps one total throughout", "schedule=constant"),
        (["method=lora", "schedule=auto"], "acts on nothing", "allocator=prune"),
        (["method=dora", "schedule=linear", "schedule.floor=3"], "linear does not read it", "read by auto"),
        (
            ["method=dora", "budget=r2", "adapter.rank=4", "allocator.start_ratio=2"],
            "allocator.start_ratio has no effect",
            "leave out one",
        ),
        (
            ["method=dora", "adapter.rank=4", "schedule=auto", "allocator.revive=false"],
            "allocator.revive has no effect with schedule=auto",
            "leave it out",
        ),
        (["method=dora", "budget=r2", "allocator.cost_aware=true"], "budget=r2 counts components", "budget=340k"),
        (
            ["method=dora", "adapter.rank=4", "schedule=auto", "allocator.cost_aware=true"],
            "schedule=auto counts components",
            "leave it out",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_first(
    words: list[str], message: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = [] if any(word.startswith("budget=") for word in words) else ["budget=null"]
    assert main([*NOWHERE, *defaults, *words, f"out={tmp_path / 'run'}"]) == 2
    printed = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert message in printed
    assert hint in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
