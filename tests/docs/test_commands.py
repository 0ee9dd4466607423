"""Every command in README.md and docs/ is checked, and runs; what cannot is listed here with its reason."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FAST = ("README.md", "docs/tutorial.md")  # the first hour of a new user; the other pages run where slow tests do

# What a page shows and no test of this file runs: pattern → why, or where it is run.
NOT_RUN = {
    r"bash scripts/(quickstart|test)\b": "trains for minutes; CI is the second",
    r"(pip3?|python3? -m pip) install ": "installs",
    r"python3 -m venv ": "installs",
    r"\. \S+/bin/activate$": "of the reader's own environment",
    r"python scripts/smollm2\.py ": "needs a package of 140 MB; its rows are tested in tests/scripts",
    r'eval "\$\(dora-recipes completion ': "of the reader's own shell: tests/cli/test_completion.py",
    r"python scripts/(quickstart_data|bench/\w+)\.py ": "needs packages with data, and minutes: tests/scripts",
    r"python docs/examples/": "tests/training/test_examples.py",
    r"(vllm|llama-server|python convert_\w+\.py|hf auth login)": "programs of others",
    r"#!/bin/bash\n#SBATCH": "needs Slurm; its signals are tested in tests/distributed",
}
# Python that a page shows in part: pattern of its beginning → why, or where the whole is run.
FRAGMENTS = {
    r"tokenizer = AutoTokenizer\.from_pretrained\(\"RUN/adapter\"\)": "tests/architectures/test_new_tokens.py",
    r"@dataclass\nclass Root\(Schedule\)": "a class to add to a file of the package",
    r'"steady_gate": ': "a line to add to a file of the package",
    r"dora = adapt\(": "tests/training/test_own_loop.py",
    r"model\.requires_grad_\(False\)\nlayers = inject": "tests/training/test_peft_parity.py has such a loop",
}
# Checked word by word like all, and then not run.
NOT_TRAINED = {
    r"torchrun .*train\.base=apart": "needs two processes: tests/distributed",
    r"torchrun .*--nnodes": "needs two machines",
    r"dora-train .*hydra/launcher=submitit": "needs Slurm: tests/cli/test_launchers.py",
    r"dora-train .*hydra/sweeper=optuna": "twenty runs: tests/cli/test_search.py",
    r"dora-\w+ .*\bpush_to_hub=": "needs the hub: tests/training/test_publishing.py",
    r"dora-\w+ checkpoint=mlx_adapters ": "needs an adapter of MLX: tests/checkpoints/test_formats.py",
    r"dora-merge 'checkpoint=\[runs/a,runs/b\]'": "needs two runs of one base: tests/checkpoints/test_combine.py",
    r"dora-report runs=runs/first,runs/other ": "needs the reader's own runs: tests/reporting",
    r"dora-train .*\btrack\.to=": "needs the trackers: tests/training/test_trackers_run.py",
    r"dora-eval .*\bharness=": "needs lm-eval: tests/evaluation/test_harness.py",
}
LOOKS = ("ls", "head", "tail", "cat")  # run as they are


def excused(thing: Any, table: dict[str, str]) -> bool:
    return any(re.match(pattern, thing.text) for pattern in table)


def words_of_training(command: Any) -> list[str] | None:
    """The words that ``dora-train`` gets, where it or torchrun starts it."""
    words = command.words
    if words[0] == "torchrun" and "dora_cli.train" in words:
        return words[words.index("dora_cli.train") + 1 :]
    return words[1:] if words[0] == "dora-train" else None


@pytest.fixture
def typed(reading: Any) -> dict[str, list[Any]]:
    """Page → its commands."""
    pages = {str(page.relative_to(ROOT)): reading.blocks(page, ROOT) for page in PAGES}
    return {page: [c for block in found for c in reading.commands(block)] for page, found in pages.items()}


def test_there_are_as_many_commands_as_one_can_count(typed: dict[str, list[Any]]) -> None:
    """A pattern that no longer finds what it should would leave nothing to test."""
    fenced = [part for page in PAGES for part in page.read_text(encoding="utf-8").split("```")[1::2]]
    fenced = [part for part in fenced if not part.startswith("text")]  # what is printed
    # In a console block what has no $ is printed, too: a run ends with the commands that come next.
    begins = [r"^ *\$ " if part.startswith("console") else r"^ *" for part in fenced]
    command = r"(?:dora-\w+|torchrun) "
    lines = sum(len(re.findall(b + command, part, re.MULTILINE)) for b, part in zip(begins, fenced, strict=True))
    found = sum(c.program.startswith(("dora-", "torchrun")) for commands in typed.values() for c in commands)
    assert found == lines > 60


def test_every_excuse_is_needed(typed: dict[str, list[Any]], reading: Any, working: Any) -> None:
    every = [command for commands in typed.values() for command in commands]
    python = [block for page in PAGES for block in reading.blocks(page, ROOT) if block.language == "python"]
    for table, things in ((NOT_RUN, every), (NOT_TRAINED, every), (FRAGMENTS, python)):
        for pattern in table:
            assert any(re.match(pattern, thing.text) for thing in things), f"nothing is excused by {pattern}"
            told = re.findall(r"tests/[\w./]*\w", table[pattern])
            assert all((ROOT / place).exists() for place in told), table[pattern]
    ours = working.entry_points(ROOT / "pyproject.toml")
    assert not [name for name in ours for pattern in NOT_RUN if re.match(pattern, f"{name} ")], "it can run now"
    known = {*ours, "torchrun", *LOOKS}
    strange = [f"{c.where}: {c.text}" for c in every if c.program not in known and not excused(c, NOT_RUN)]
    assert not strange


def test_every_word_of_every_command_is_known(typed: dict[str, list[Any]]) -> None:
    """Flags, names, keys, types and ranges; without composing, so for all pages in a second."""
    from dora_cli.cli import compress as compressing
    from dora_cli.cli import eval as evaluating
    from dora_cli.cli import merge as merging
    from dora_cli.cli.parts import load_parts
    from dora_cli.cli.run import split_flags
    from dora_cli.config.check import check_range, check_type, find_key, known_keys
    from dora_cli.config.compose import root_schema
    from dora_cli.config.launching import take
    from dora_cli.config.overrides import parse, parse_sweep
    from dora_cli.config.recipes import GROUPS, check_choice, recipes_dir
    from dora_cli.errors import UserError

    keys, folders = known_keys(root_schema(load_parts())), [recipes_dir()]

    def check(command: Any) -> bool:
        words = words_of_training(command)
        if words is None:
            others: dict[str, Any] = {"dora-merge": merging.parse, "dora-eval": evaluating._split}
            read = (others | {"dora-compress": compressing.parse}).get(command.program)
            return read is not None and bool(read(split_flags(command.words[1:]).overrides))
        arguments = split_flags(words)
        overrides = arguments.overrides
        if arguments.multirun:
            overrides, swept = parse_sweep(take(overrides)[1], keys, folders, search=True)
            for key in set(swept) - set(GROUPS):
                find_key(key, keys)
        for override in parse(overrides, keys):
            if override.key not in GROUPS:
                known = find_key(override.key, keys)
                check_type(known, override.value)
                check_range(known, override.value)
            elif not arguments.config_dirs and not re.search(r"[/.]", str(override.value)):
                check_choice(override.key, override.value, folders)
        return True

    checked, wrong = 0, []
    for command in (c for commands in typed.values() for c in commands if not c.output.startswith("error:")):
        try:
            checked += check(command)
        except UserError as error:
            wrong.append(f"{command.where}: {command.text}: {error.message}")
    assert not wrong
    assert checked > 100


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p, marks=() if p in FAST else pytest.mark.slow)
        for p in (str(q.relative_to(ROOT)) for q in PAGES)
    ],
)
def test_the_commands_of_a_page_run_one_after_the_other(
    page: str, reading: Any, working: Any, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = working.entry_points(ROOT / "pyproject.toml")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in reading.blocks(ROOT / page, ROOT):
        if block.title:
            file = workshop.folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.language == "python" and not excused(block, FRAGMENTS):
            working.run_python(block.text, names, block.where)
        for command in reading.commands(block):
            if excused(command, NOT_RUN) or excused(command, NOT_TRAINED):
                continue
            if command.program in LOOKS:
                workshop.shell(command.text)
                continue
            argv = words_of_training(command)
            name = "dora-train" if argv is not None else command.program
            code = commands[name](command.words[1:] if argv is None else argv)
            said = capsys.readouterr()
            refused = command.output.startswith("error:")
            assert code == (2 if refused else 0), f"{command.where}: {command.text}\n{said.err}"
            assert not refused or said.err.strip() == command.output, command.where
