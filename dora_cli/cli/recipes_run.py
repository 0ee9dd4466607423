"""``dora-recipes show`` and ``diff``: recipes composed, which takes Hydra and the parts."""

from collections.abc import Iterator, Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

import yaml

from dora_cli.cli.parts import load_parts
from dora_cli.cli.recipes import copied_from
from dora_cli.cli.run_folder import differences
from dora_cli.config.compose import Composed, compose
from dora_cli.config.recipes import choices, is_file, recipes_dir, search_folders
from dora_cli.config.record import recipe_of
from dora_cli.config.schema import PART_GROUPS
from dora_cli.errors import UserError

COMMENTS = 44  # column of the comments


def show(name: str, keys: Sequence[str], config_dirs: Sequence[str]) -> str:
    """The whole configuration as YAML, and beside each value that is no default where it stands."""
    composed = _composed(name, keys, config_dirs)
    origin = composed.origin
    part_defaults = {f"{group}.{key}" for group in PART_GROUPS for key in vars(composed.parts[group])}
    content = yaml.safe_load(composed.yaml)
    chosen = content.pop("defaults")
    lines = [f"# recipe {composed.recipe}, composed; what has no comment has its default"]
    for entry in chosen:
        if isinstance(entry, dict):
            lines += [f"#   {group.split('/')[-1]}={choice}" for group, choice in entry.items()]

    def where(key: str) -> str:
        if key in origin:
            return "the command line" if origin[key] is None else _shown(str(origin[key]))
        return f"{key.split('.')[0]}'s own default" if key in part_defaults else ""

    for indent, key, text, leaf in _lines(content):
        line = f"{'  ' * indent}{key.rpartition('.')[2]}:{text and ' '}{text}"
        comment = where(key) if leaf else ""
        lines.append(f"{line:<{COMMENTS}}# {comment}" if comment else line)
    return "\n".join(lines)


def diff(names: Sequence[str], config_dirs: Sequence[str]) -> str:
    """What differs, ``key: shipped → mine``, one a line; of one name what it was made from is the other.

    Raises:
        UserError: nothing says what to compare with.
    """
    mine = names[0]
    shipped = names[1] if len(names) > 1 else _made_from(mine, config_dirs)
    old, new = (_composed(name, (), config_dirs).yaml for name in (shipped, mine))
    found = differences(old, new)
    if not found:
        return f"{mine} comes to the same as {shipped}"
    return "\n".join([f"{shipped} → {mine}", *(f"  {line}" for line in found)])


def _composed(name: str, keys: Sequence[str], config_dirs: Sequence[str]) -> Composed:
    return compose([f"recipe={name}", *keys], load_parts(), config_dirs, to_run=False)


def _made_from(mine: str, config_dirs: Sequence[str]) -> str:
    """The recipe that a copy or a run's configuration was made from."""
    path = Path(expanduser(mine))
    text = path.read_text(encoding="utf-8", errors="replace") if is_file(mine) and path.is_file() else ""
    name = copied_from(text) or recipe_of(text)
    if name is None or name not in choices("recipe", search_folders(config_dirs)):
        raise UserError(
            f"{mine} does not say which recipe it was made from"
            + (f": {name} is none that is shipped" if name else ""),
            hint=f"name it: dora-recipes diff {mine} NAME",
        )
    return name


def _lines(node: Mapping[str, Any], prefix: str = "", indent: int = 0) -> Iterator[tuple[int, str, str, bool]]:
    """Depth, key, value on one line, and whether there is one."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield indent, f"{prefix}{name}", "", False
            yield from _lines(value, f"{prefix}{name}.", indent + 1)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
            yield indent, f"{prefix}{name}", text.removesuffix("\n").removesuffix("\n..."), True


def _shown(where: str) -> str:
    """``in FILE, line 7`` as ``FILE:7``, a shipped file by its name in the recipes."""
    return (
        where.removeprefix("in ")
        .replace(f"{recipes_dir()}/", "")
        .replace(f"{recipes_dir().name}/", "", 1)
        .replace(", line ", ":")
    )
