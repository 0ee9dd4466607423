"""Write docs/reference/: every command's help, every key, the options of every part, every recipe, from the code.

python scripts/reference_doc.py            writes the files
python scripts/reference_doc.py --check    exits 1 where a file is not what would be written
"""

import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

from dora_cli.config.recipes import offered, sentences
from dora_cli.config.schema import MISSING as NOT_GIVEN
from dora_cli.config.schema import Config
from dora_cli.config.sweeps import LAUNCHERS, SWEEPERS
from dora_cli.registry import PART_TABLES, load, part_table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
NOTE = "<!-- Written by scripts/reference_doc.py; a test holds it to the code. -->"
HEADER = ["| key | | default | type |", "| --- | --- | --- | --- |"]
BOUNDS = {"low": "≥ {}", "above": "> {}", "high": "≤ {}", "below": "< {}"}
WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false", Any: "see left"}


def pages() -> dict[str, str]:
    """File name → text."""
    return {"commands.md": commands(), "keys.md": keys(), "parts.md": parts(), "recipes.md": recipes()}


def commands() -> str:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    lines = ["What each command says to `--help`. Keys are words `key=value`, in any order.", ""]
    for name, place in scripts.items():
        lines += [f"## {name}", "", "```text", help_of(place.split(":")[0]), "```", ""]
    return _page("Commands", lines)


def help_of(module: str) -> str:
    """What ``python -m MODULE --help`` prints, from any folder; the recipes listed are the shipped ones."""
    words = [sys.executable, "-m", module, "--help"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    return said.stdout.rstrip()


def keys() -> str:
    lines = [
        "Every key of a run but those of its [parts](parts.md). They go on the command line, `train.epochs=4`, or into",
        "a recipe, where `train.epochs` is `epochs` under `train`. The command line beats the recipe, the recipe beats",
        "the values tuned for a pair of data and method, and these beat the method.",
        "",
    ]
    top = [f for f in _rows(Config) if "." not in f.split("|")[1]]
    lines += ["## The run", "", *HEADER, *top, ""]
    hints = get_type_hints(Config)
    for f in fields(Config):
        if is_dataclass(hints[f.name]):
            lines += [f"## {f.name}", "", *HEADER, *_rows(hints[f.name], f"{f.name}."), ""]
    lines += [
        "## Sweeps",
        "",
        "With `-m`: who runs the jobs (`hydra/launcher=NAME`) and who proposes them (`hydra/sweeper=NAME`);",
        "[scale.md](../scale.md#sweeps-on-many-machines) has examples.",
        "",
    ]
    for group, table in (("launcher", LAUNCHERS), ("sweeper", SWEEPERS)):
        for name, schema in table.items():
            lines += [f"### hydra/{group}={name}", "", f"{(schema.__doc__ or '').strip()}", ""]
            rows = _rows(schema, f"hydra.{group}.")
            lines += [*HEADER, *rows, ""] if rows else []
    return _page("Keys", lines)


def parts() -> str:
    lines = [
        "A method is one answer to each of five questions, and an answer's options are keys of its group:",
        "`schedule.start=0.2`. A key that the chosen part does not read is an error. What each part is, and what goes",
        "with what, is in [methods.md](../methods.md). A default stands with its part, and a method may set another.",
        "",
    ]
    for group in PART_TABLES:
        readers: dict[str, list[str]] = {}  # row → the parts that have just this option
        for name in part_table(group):
            for row in _rows(load(part_table(group), name, key=group), f"{group}."):
                readers.setdefault(row, []).append(f"`{name}`")
        lines += [f"## {group}", "", "| key | | default | type | read by |", "| --- | --- | --- | --- | --- |"]
        lines += [f"{row} {', '.join(names)} |" for row, names in readers.items()]
        silent = [f"`{name}`" for name in part_table(group) if not any(f"`{name}`" in n for n in readers.values())]
        lines += ["", *([f"Without options: {', '.join(silent)}.", ""] if silent else [])]
    return _page("Options of parts", lines)


def recipes() -> str:
    folders = [ROOT / "recipes"]
    lines = ["`recipe=NAME` names a whole run; `model=`, `data=` and `method=` exchange a part of it.", ""]
    for group in ("recipe", "model", "data", "method"):
        told = sentences(group, folders)
        lines += [f"## {group}", "", "| name | |", "| --- | --- |"]
        lines += [f"| `{name}` | {_cell(told.get(name, ''))} |" for name in offered(group, folders)]
        lines.append("")
    return _page("Recipes", lines)


def _page(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"# {title}", "", NOTE, "", *lines]).rstrip() + "\n"


def _rows(schema: type, prefix: str = "") -> list[str]:
    """A row of a table for each key, those of nested dataclasses after the others."""
    hints, rows, nested = get_type_hints(schema), [], []
    for f in fields(schema):
        hint = hints[f.name]
        if is_dataclass(hint):
            nested += _rows(hint, f"{prefix}{f.name}.")  # type: ignore[arg-type]
            continue
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        row = [f"`{prefix}{f.name}`", _cell(f.metadata["help"]), _default(default), _type(hint, f.metadata)]
        rows.append(f"| {' | '.join(row)} |")
    return rows + nested


def _type(hint: Any, meta: Mapping[str, Any]) -> str:
    """In words, with the range."""
    if meta.get("choices"):
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    kinds = [k for k in get_args(hint) if k is not types.NoneType] if isinstance(hint, types.UnionType) else [hint]
    if set(kinds) == {int, float}:
        text = "number"
    elif get_origin(kinds[0]) is list:
        text = "list"
    elif get_origin(kinds[0]) is dict:
        text = "mapping"
    else:
        text = WORDS.get(kinds[0], "see left")
    bounds = [form.format(f"{meta[bound]:,}".removesuffix(".0")) for bound, form in BOUNDS.items() if bound in meta]
    return f"{text} {', '.join(bounds)}".strip()


def _default(value: Any) -> str:
    if value == NOT_GIVEN or value is MISSING:
        return "to be given"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    """For a table: no bars, no line breaks, and braces and stars as they are."""
    return re.sub(r"\s+", " ", text.replace("\n", "\\n")).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> int:
    written = pages()
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in written.items() if not _is(FOLDER / name, text)]
        if stale:
            print(f"not current: {', '.join(stale)}; run python scripts/reference_doc.py")
        return int(bool(stale))
    FOLDER.mkdir(exist_ok=True)
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"wrote {', '.join(written)} in {FOLDER.relative_to(ROOT)}")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
