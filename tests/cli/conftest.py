"""Sweeps of small stand-ins for runs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

# A job that writes what it was told, and fails as its seed says.
JOB = """
import json, os, sys
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
os.makedirs(given["out"], exist_ok=True)
code = {"2": 2, "3": 1}.get(given.get("seed"), 0)
if code == 0:
    summary = {"best": {"step": 1, "name": "accuracy", "value": 0.9375}}
    json.dump(summary, open(given["out"] + "/summary.json", "w"))
    json.dump(given, open(given["out"] + "/config.yaml", "w"))
print("job says", given)
sys.exit(code)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """In an empty folder, jobs of sweeps run this text instead of training; their words are their configuration."""
    from dora_cli.cli import resweep, sweep

    def configuration(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> SimpleNamespace:
        given = dict(word.split("=", 1) for word in overrides)
        config = SimpleNamespace(dry_run="dry_run" in given, overwrite=given.get("overwrite") == "true")
        return SimpleNamespace(config=config, origin=given, yaml=json.dumps(given))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resweep, "configuration", configuration)
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, "-c", JOB])
    return JOB
