"""What TAB offers: words for a command line that is being written. Imports nothing slow, and reads no file in vain.

A shell's script (``dora-recipes completion SHELL`` prints it) asks ``dora-recipes completion words COMMAND WORD…`` at
each TAB, the last word being the one at the cursor. Each line of the answer is a whole word; one that ends in ``=``,
``.`` or ``/`` is to be gone on with, so no blank follows it.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from os.path import expanduser
from pathlib import Path
from typing import Any, get_type_hints

from dora_cli.cli.part_keys import part_keys
from dora_cli.cli.plain_keys import COMPRESS_KEYS, EVAL_KEYS, MERGE_KEYS, REPORT_KEYS
from dora_cli.config.recipes import GROUPS, offered, search_folders
from dora_cli.config.schema import PART_GROUPS, Config
from dora_cli.config.sweeps import LAUNCHERS, SWEEPERS
from dora_cli.errors import UserError

HELP = ("--help", "--version")
FLAGS: dict[str, tuple[str, ...]] = {"dora-train": ("--multirun", "--config-dir", *HELP)}
FLAGS |= dict.fromkeys(("dora-eval", "dora-recipes"), ("--config-dir", *HELP))
FLAGS |= dict.fromkeys(("dora-merge", "dora-compress", "dora-report"), HELP)
PLAIN = {
    "dora-merge": MERGE_KEYS,
    "dora-compress": COMPRESS_KEYS,
    "dora-eval": EVAL_KEYS,
    "dora-report": REPORT_KEYS,
}
SHELLS = ("bash", "zsh", "fish")
SUBCOMMANDS = ("list", "show", "copy", "diff", "completion")
FILES = ("data.path", "data.cache", "checkpoint", "runs", "base", "adapter.init_from", "model.name", "recipe", "to")
FOLDERS = ("out", "--config-dir", "harness.include_path")
BOOLS = ("true", "false")
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "base_weights": ("original", "dequantised"),
    "rank_by": ("energy", "energy_per_parameter"),
    "split": ("train", "validation", "test"),
    "harness.chat_template": BOOLS,
    "hydra/launcher": tuple(LAUNCHERS),
    "hydra/sweeper": tuple(SWEEPERS),
}


def script(shell: str) -> str:
    """What a shell is to read at its start."""
    return (Path(__file__).with_name("completions") / f"dora.{shell}").read_text(encoding="utf-8")


def words(command: str, before: Sequence[str], current: str) -> list[str]:
    """What may stand at the cursor.

    Args:
        command: ``dora-train`` or another one; of an unknown one nothing is known.
        before: the words between the command and the cursor.
        current: the word at the cursor, as far as it is written.
    """
    if command not in FLAGS:
        return []
    if before and before[-1] == "--config-dir":
        return _paths("", current, folders=True)
    if current.startswith("-"):
        return [flag for flag in FLAGS[command] if flag.startswith(current)]
    try:
        folders = search_folders(b for a, b in pairwise(before) if a == "--config-dir")
    except UserError:
        folders = search_folders()
    if command == "dora-recipes" and "=" not in current:
        found = _of_recipes([word for word in before if not word.startswith("-")], folders)
        if found is not None:
            files = _paths("", current) if before[:1] == ["diff"] and ("/" in current or not before[1:]) else []
            return [word for word in found if word.startswith(current)] + files
    key, equals, value = current.partition("=")
    if equals:
        return _values(key, value, folders)
    given = {word.partition("=")[0] for word in before}
    return [word for word in _keys(command, current) if word.startswith(current) and word[:-1] not in given]


def _of_recipes(before: Sequence[str], folders: Sequence[Path]) -> list[str] | None:
    """The words of ``dora-recipes``; None where a key comes next."""
    if not before:
        return list(SUBCOMMANDS)
    if before[0] == "completion":
        return list(SHELLS) if len(before) == 1 else []
    if before[0] == "list":
        return [group for group in GROUPS if group not in PART_GROUPS] if len(before) == 1 else []
    names = offered("recipe", folders)
    if before[0] in ("show", "copy") and len(before) == 1:
        return [*names, *(f"{group}/{n}" for group in ("method", "model", "data") for n in offered(group, folders))]
    if before[0] == "diff" and len(before) <= 2:
        return names
    return ["to="] if before[0] == "copy" else None


def _keys(command: str, current: str) -> Iterable[str]:
    """Keys, each with its ``=``; of a section only its name and a dot until that is written."""
    if command in PLAIN:
        return [f"{key}=" for key in PLAIN[command]]
    section, dot, _ = current.partition(".")
    if not dot:
        nested = [f"{f.name}." for f in fields(Config) if is_dataclass(f.type)] + [f"{group}." for group in PART_GROUPS]
        plain = [f"{f.name}=" for f in fields(Config) if not is_dataclass(f.type)]
        return [*(f"{group}=" for group in GROUPS), *plain, *nested, "hydra/launcher=", "hydra/sweeper="]
    if section in PART_GROUPS:
        return [f"{key}=" for key in part_keys(section)]
    inner = get_type_hints(Config).get(section)
    if not is_dataclass(inner):
        return []
    return [f"{section}.{f.name}" + ("." if "dict" in str(f.type) else "=") for f in fields(inner)]


def _values(key: str, value: str, folders: Sequence[Path]) -> list[str]:
    """Whole words ``key=value``. Of ``a,b`` the last one is completed."""
    done, comma, last = value.rpartition(",")
    found = [f"{key}={done}{comma}{name}" for name in _offered(key, folders) if str(name).startswith(last)]
    if key in FOLDERS or key in FILES:
        ends = (".yaml", ".yml") if key in ("recipe", "to") else ()
        found += _paths(f"{key}=", value, folders=key in FOLDERS, ends=ends)
    return found


def _offered(key: str, folders: Sequence[Path]) -> Iterable[str]:
    if key in GROUPS:
        return offered(key, folders)
    if key in CHOICES:
        return CHOICES[key]
    section, dot, name = key.rpartition(".")
    if section in PART_GROUPS:
        known = part_keys(section).get(key)
        return () if known is None else BOOLS if known.hint == "bool" else known.meta.get("choices", ())
    owner: Any = get_type_hints(Config).get(section) if dot else Config
    field = next((f for f in fields(owner) if f.name == name), None) if is_dataclass(owner) else None
    if field is None:
        return ()
    choices = [str(c).lower() if isinstance(c, bool) else c for c in field.metadata.get("choices", ())]
    return choices or (BOOLS if field.type is bool else ())


def _paths(prefix: str, start: str, *, folders: bool = False, ends: tuple[str, ...] = ()) -> list[str]:
    """Files and folders that begin so, folders with a slash; hidden ones where a dot is written."""
    name = start.rpartition("/")[2]
    written = start[: len(start) - len(name)]
    try:
        entries = sorted(os.scandir(expanduser(written) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    found = []
    for entry in entries:
        if not entry.name.startswith(name) or (entry.name.startswith(".") and not name.startswith(".")):
            continue
        if entry.is_dir():
            found.append(f"{prefix}{written}{entry.name}/")
        elif not folders and entry.name.endswith(ends or ("",)):
            found.append(f"{prefix}{written}{entry.name}")
    return found
