"""Completion: what is offered where, and TAB in real shells."""

import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dora_cli.cli.completion import script, words
from dora_cli.cli.recipes import main

ROOT = Path(__file__).resolve().parents[2]
STARTS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(dora-recipes completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -U compinit; compinit -D; eval "$(dora-recipes completion zsh)"'),
    "fish": (["fish", "--no-config", "-i"], "dora-recipes completion fish | source"),
}


@pytest.mark.parametrize(
    ("typed", "offered", "not_offered"),
    [
        (["sch"], ["schedule=", "schedule."], ["seed="]),
        (["train.learning"], ["train.learning_rate="], ["train.epochs="]),
        (["schedule.st"], ["schedule.start=", "schedule.steepness="], ["schedule.end="]),
        (["recipe=quick"], ["recipe=quickstart"], ["recipe=glue_sst2"]),
        (["method=dora,adal"], ["method=dora,adalora"], ["method=dora,lora"]),
        (["dry_run="], ["dry_run=true", "dry_run=json"], []),
        (["allocator.revive="], ["allocator.revive=true"], []),
        (["export="], ["export=exact", "export=uniform"], []),
        (["seed=3", "se"], [], ["seed="]),
        (["budget="], [], ["budget=null"]),
        (["--m"], ["--multirun"], ["--help"]),
        (["data.path=own"], ["data.path=own files/", "data.path=own.csv"], ["data.path=.hidden"]),
        (["out=own"], ["out=own files/"], ["out=own.csv"]),
        (["data.columns."], [], []),
        (["nonsense=", "nonsense.", "a=b=c"], [], []),
    ],
)
def test_what_is_offered(typed, offered, not_offered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own files").mkdir()
    for name in ("own.csv", ".hidden"):
        (tmp_path / name).touch()
    found = words("dora-train", typed[:-1], typed[-1])
    assert set(offered) <= set(found) and not set(not_offered) & set(found)
    assert all(word.startswith(typed[-1]) for word in found)


def test_other_commands_offer_their_own_words(tmp_path):
    left = words("dora-merge", ["checkpoint=x"], "")
    assert left[:5] == ["out=", "base=", "base_weights=", "dtype=", "shard_size="] and "combine=" in left
    assert words("dora-merge", [], "dtype=b") == ["dtype=bfloat16"]
    assert words("dora-compress", ["checkpoint=x"], "rank_by=energy_") == ["rank_by=energy_per_parameter"]
    assert words("dora-report", [], "") == ["runs=", "out=", "baseline="]
    assert words("dora-recipes", [], "s") == ["show"]
    assert "quickstart" in words("dora-recipes", ["show"], "") and words("dora-recipes", ["copy", "x"], "") == ["to="]
    assert words("dora-recipes", ["completion"], "f") == ["fish"]
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "ours.yaml").touch()
    assert words("dora-train", ["--config-dir", str(tmp_path)], "recipe=our") == ["recipe=ours"]
    assert words("ls", [], "") == []


def test_an_answer_takes_a_third_of_a_second_at_most_and_nothing_slow():
    code = "import sys; from dora_cli.cli.recipes import main; main(sys.argv[1:]); print(sorted(sys.modules))"
    argv = [sys.executable, "-c", code, "completion", "words", "dora-train", "method=dora", "schedule.st"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith("schedule.start=\n")
    assert not {"torch", "hydra", "omegaconf", "yaml", "rich"} & set(done.stdout.replace("'", " ").split())
    # Of the processor's time: the machine may be busy with other tests.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_a_shells_script_is_printed(capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash")
    assert main(["completion", "tcsh"]) == 2


def test_bash_is_given_words_as_they_are_to_be_typed(tmp_path):
    """Nothing where nothing is offered; blanks quoted once, commas never."""
    (tmp_path / "my dir").mkdir()
    lines = [
        "dora-train budget=0.1",
        "dora-train data.path=my",
        r"dora-train data.path=my\ d",
        "dora-train method=dora,lo",
    ]
    lines += [r"dora-train --config-dir my\ dir sched", "dora-train recipe=quickst"]
    asks = f"""
        COMP_WORDBREAKS='=:'
        dora-recipes() {{ "{sys.executable}" -m dora_cli.cli.recipes "$@"; }}
        while IFS= read -r COMP_LINE; do
            COMP_POINT=${{#COMP_LINE}}
            _dora_complete dora-train </dev/null
            printf '<%s>' "${{COMPREPLY[@]-none}}"; echo
        done
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script("bash") + asks],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout.splitlines() == [
        "<none>",
        r"<my\ dir/>",
        r"<my\ dir/>",
        "<dora,lora >",
        "<schedule=><schedule.>",
        "<quickstart >",
    ]


@pytest.mark.parametrize("shell", STARTS)
def test_tab_in_a_real_shell(shell, tmp_path):
    """Typed on a terminal, with TABs: the command gets the whole words."""
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    folder, got = tmp_path / "bin", tmp_path / "got"
    folder.mkdir()
    for name, does in {
        "dora-recipes": f'exec "{sys.executable}" -m dora_cli.cli.recipes "$@"',
        "dora-train": f'echo "$@" >{got}.part; mv {got}.part {got}',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "reviews.csv").touch()
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    argv, start = STARTS[shell]
    typed = f"{start}\n", "dora-train budget=0.1\t schedule=cubic_l\ttrain.sched\tlin\tdata.path=rev\t\n"
    said = on_a_terminal(argv, environment, tmp_path, typed, until=got.exists)
    assert got.exists(), said
    assert got.read_text() == "budget=0.1 schedule=cubic_late train.scheduler=linear data.path=reviews.csv\n"


def on_a_terminal(argv, environment, folder, typed, until, seconds=30):
    """Run a program on a terminal of its own and type; each line when nothing was said for a moment."""
    pid, screen = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe(argv[0], argv, environment)
    said, lines, end, quiet = "", list(typed), time.monotonic() + seconds, 0
    try:
        while not until() and time.monotonic() < end:
            if select.select([screen], [], [], 0.1)[0]:
                said, quiet = said + os.read(screen, 4096).decode(errors="replace"), 0
            else:
                quiet += 1
            if quiet == 5 and lines:
                os.write(screen, lines.pop(0).encode())
                quiet = 0
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(screen)
    return said
