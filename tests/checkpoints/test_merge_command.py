"""``dora-merge`` from the outside: exit codes, messages, and what it prints."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_cli.cli.merge import main

MakeCase = Callable[..., Any]  # tests/checkpoints/conftest.py


def test_it_merges_and_says_what(make_case: MakeCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make_case("roberta")
    case.write(tmp_path / "run" / "adapter")
    out = tmp_path / "a=b:c"
    assert main([f"checkpoint={tmp_path / 'run'}", f"out={out}", "shard_size=4KB", "dtype=auto", "base=null"]) == 0
    text = capsys.readouterr().out
    modules = [update.rank for update in case.updates if update.rank]
    assert f"{len(modules)} modules, ranks 1 to 3, {sum(modules)} components" in text
    assert f"{len(list(out.glob('*.safetensors')))} files" in text and str(out) in text and str(case.base) in text
    assert "4 tensors as trained (classifier.dense.bias, …)" in text and "of another head (lm_head." in text
    torch.testing.assert_close(case.logits(case.load_merged(out)), case.logits(case.dense()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "checkpoint= is missing"),
        (["checkpoint=x"], "out= is missing"),
        (["checkpoint=x", "out="], "out= is missing"),
        (["chekpoint=x", "out=y"], "did you mean 'checkpoint'"),
        (["checkpoint", "out=y"], "'checkpoint' has no value"),
        (["checkpoint=x", "out=y", "out=z"], "out is given twice"),
        (["checkpoint=x", "out=y", "--dytpe"], "unknown flag '--dytpe'"),
        (["checkpoint=x", "out=y", "dtype=bf16"], "unknown dtype 'bf16'"),
        (["checkpoint=x", "out=y", "shard_size=big"], "shard_size=big is no size"),
        (["checkpoint=/nowhere", "out=y"], "there is no folder /nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_help_answers_in_under_a_second_without_torch() -> None:
    script = (
        "import sys; from dora_cli.cli.merge import main; code = main(['--help']); assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 1
    assert "dora-merge checkpoint=RUN_OR_ADAPTER" in done.stdout
