"""Small versions of the fault campaigns; the large ones are started by hand (docs/reliability.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[2] / "scripts" / "faults"


def campaign(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FAULTS / script), *words], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_killed_runs_end_where_they_would_have_ended(tmp_path: Path) -> None:
    done = campaign(
        "kill.py", "--kills", "3", "--methods", "dora", "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["results"]["dora"]
    assert sum(found["kills"].values()) == 3
    assert found["ended"] >= 1
    assert found["wrong"] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_killed_merges_and_evaluations_leave_what_was_there_or_all_of_the_new(tmp_path: Path) -> None:
    words = ["--kills", "2", "--commands", "merge split", "eval run", "--folder", str(tmp_path)]
    done = campaign("kill_merge.py", *words, "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [sum(tally["kills"].values()) for tally in found.values()] == [1, 1]
    assert all(tally["ended"] and not tally["wrong"] for tally in found.values())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_damaged_files_are_refused_or_harmless(tmp_path: Path) -> None:
    done = campaign(
        "damage.py", "--cases", "8", "--folder", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) >= 8
    assert {case["verdict"] for case in found} <= {"refused", "harmless", "unknowable"}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_hostile_arguments_end_in_one_message(tmp_path: Path) -> None:
    words = ["--kinds", "arguments", "merge", "eval", "override", "--overrides", "10"]
    done = campaign("hostile.py", *words, "--folder", str(tmp_path), "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert {case["kind"] for case in found} == {"arguments", "merge", "eval", "override"}
    assert sum(case["verdict"] == "refused" for case in found) > 30


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_fuzzed_inputs_give_a_result_or_one_message(tmp_path: Path) -> None:
    words = ["--targets", "budget", "targets", "adapters", "data", "checkpoints", "--examples", "30"]
    done = campaign("fuzz.py", *words, "--folder", str(tmp_path), "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [one["target"] for one in found] == words[1:6]
    assert all(one["accepted"] and one["refused"] and not one["wrong"] for one in found)
