"""Help: complete, 80 columns, and quick, because nothing slow is imported."""

import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from dora_cli.cli.help import PART_KEYS, eval_help, merge_help, train_help
from dora_cli.cli.parts import load_parts
from dora_cli.config.check import known_keys
from dora_cli.config.recipes import choices, recipes_dir, sentences
from dora_cli.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = ("torch", "hydra", "omegaconf", "transformers", "datasets", "yaml", "rich")


def command(*argv, **more):
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dora_cli.cli.train", *argv], capture_output=True, text=True, cwd=ROOT, **more
    )
    return done, time.perf_counter() - start


def quickest(*argv):
    """The best of three: the machine may be busy with other tests."""
    return min((command(*argv) for _ in range(3)), key=lambda pair: pair[1])


def test_help_lists_recipes_and_methods_with_a_sentence_each():
    text = train_help([recipes_dir()])
    for group in ("recipe", "method"):
        found = sentences(group, [recipes_dir()])
        assert len(found) >= 8
        for name, sentence in found.items():
            assert sentence, f"{group}/{name} has no sentence on line 2"
            assert f"\n  {name} " in text


def test_help_names_every_key_and_every_part():
    text = train_help([recipes_dir()])
    for key in [*known_keys(Config), *PART_KEYS]:
        assert f"\n  {key}" in text
    for group in ("adapter", "importance", "schedule", "allocator", "regularizer"):
        for name in choices(group, [recipes_dir()]):
            assert name in text


def test_the_keys_of_parts_that_help_names_exist():
    parts = load_parts()
    for key in PART_KEYS:
        group, option = key.split(".")
        assert any(option in {f.name for f in fields(part)} for part in parts[group].values())


@pytest.mark.parametrize("text", [train_help([recipes_dir()]), merge_help(), eval_help()])
def test_help_fits_80_columns(text):
    assert max(len(line) for line in text.splitlines()) <= 80


def test_help_answers_at_once_and_imports_nothing_slow():
    done, seconds = quickest("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "usage: dora-train" in done.stdout
    assert seconds < 1
    probe = "import sys, dora_cli.cli.train as t; t.main(['-h']); print(sorted(set(sys.modules) & set(sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", probe, *FORBIDDEN], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_survives_a_terminal_that_knows_ascii_only():
    done, _ = command("--help", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "usage: dora-train" in done.stdout


def test_help_wins_over_everything_else_on_the_line():
    done, _ = command("recipe=nonsense", "--help")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("recipe=glue_sts2", "'glue_sst2'"),
        ("method=dorra", "'dora'"),
        ("schedule=cubik_late", "'cubic_late'"),
    ],
)
def test_a_mistyped_name_is_answered_at_once(argument, hint):
    done, seconds = quickest(argument)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown ") and hint in done.stderr
    assert seconds < 1


def test_no_recipe_is_said_with_the_recipes():
    done, _ = command()
    assert done.returncode == 2
    assert "no recipe is given" in done.stderr and "glue_sst2" in done.stderr


def test_version():
    from dora_cli import __version__

    done, _ = command("--version")
    assert done.stdout == f"dora-cli {__version__}\n"


def test_a_users_folder_joins_the_help(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "ours.yaml").write_text("# @package _global_\n# Our own.\n")
    done, _ = command("--help", "--config-dir", str(tmp_path))
    assert "ours" in done.stdout and "Our own." in done.stdout
