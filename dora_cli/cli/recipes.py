"""``dora-recipes``: list, show, copy and compare recipes; and what makes TAB complete."""

import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from dora_cli.cli.completion import SHELLS, SUBCOMMANDS, script, words
from dora_cli.cli.help import COLUMN, columns, offers, recipes_help
from dora_cli.cli.run import answered, guard, split_flags
from dora_cli.config.recipes import GROUPS, HEADER, choices, is_file, search_folders
from dora_cli.config.schema import PART_GROUPS
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean

FILED = ("recipe", "method", "model", "data")  # groups whose choices are files


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["completion", "words"]:  # of a line that may hold flags, of another command
        return guard(_complete, words)
    return guard(run, words)


def run(argv: list[str]) -> None:
    """Do what the first word says; without one, list the recipes.

    Raises:
        UserError: an unknown command or name, or words that it does not take.
    """
    arguments = split_flags(argv, ("-h", "--help", "--version", "--config-dir"))
    if answered(arguments, recipes_help):
        return
    folders = search_folders(arguments.config_dirs)
    command, rest = (arguments.overrides or ["list"])[0], arguments.overrides[1:]
    if command == "list":
        print(listing(_one_of(rest, "list [GROUP]", least=0), folders))
    elif command == "copy":
        print(copy(*_name_and_to(rest), folders))
    elif command == "completion":
        shell = _one_of(rest, f"completion {'|'.join(SHELLS)}")
        if shell not in SHELLS:
            raise UserError(f"unknown shell '{shell}'", hint=did_you_mean(shell, SHELLS))
        print(script(shell), end="")
    elif command in ("show", "diff"):
        names = [word for word in rest if "=" not in word]
        keys = [word for word in rest if "=" in word]
        usage = "show NAME [key=value …]" if command == "show" else "diff MINE [NAME]"
        if not names or len(names) > (1 if command == "show" else 2) or (keys and command == "diff"):
            raise UserError(f"cannot read '{' '.join(argv)}'", hint=f"write dora-recipes {usage}")
        path = group_file(names[0], folders) if command == "show" else None
        if path is not None:
            print(path.read_text(encoding="utf-8"), end="")
            return
        from dora_cli.cli.recipes_run import diff, show

        print(show(names[0], keys, arguments.config_dirs) if command == "show" else diff(names, arguments.config_dirs))
    else:
        raise UserError(f"unknown command '{command}'", hint=did_you_mean(command, SUBCOMMANDS))


def listing(group: str, folders: Sequence[Path]) -> str:
    """What a group offers, with a sentence each; recipes where none is named.

    Raises:
        UserError: there is no such group.
    """
    group = group or "recipe"
    group = group.removesuffix("s") if group not in GROUPS else group  # as one says it
    if group not in GROUPS:
        raise UserError(f"unknown group '{group}'", hint=did_you_mean(group, GROUPS))
    return "\n".join(columns(offers(group, folders), indent="", column=COLUMN))


def group_file(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of ``GROUP/NAME``; None for a recipe.

    Raises:
        UserError: the group has no such file.
    """
    group, slash, rest = name.partition("/")
    if is_file(name) or not slash or group not in GROUPS:
        return None
    if group in PART_GROUPS:
        raise UserError(f"{group} has no files: parts are code", hint=f"dora-train --help {group} shows their keys")
    known = choices(group, folders)
    if rest not in known:
        raise UserError(f"unknown {group} '{rest}'", hint=did_you_mean(rest, known))
    return known[rest]


def copy(name: str, to: str, folders: Sequence[Path]) -> str:
    """Write a copy of a shipped file, with a line that says of what. Returns what to do with it.

    Raises:
        UserError: there is no such file, or something is at ``to`` already.
    """
    source = group_file(name, folders)
    group = name.partition("/")[0] if source is not None else "recipe"
    if source is None:
        known = choices("recipe", folders)
        if name not in known:
            raise UserError(f"unknown recipe '{name}'", hint=did_you_mean(name, known))
        source = known[name]
    path = Path(expanduser(to))
    if not is_file(to):
        raise UserError(f"to={to} is no YAML file", hint=f"write to={to.rstrip('/')}.yaml")
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    at = 2 if lines[0].startswith(HEADER) else 1  # below the sentence that lists say
    lines.insert(at, f"{COPIED}{name}\n")
    try:
        with path.open("x", encoding="utf-8") as file:  # never over a file that is there
            file.writelines(lines)
    except FileExistsError:
        raise UserError(f"to={to} is there already", hint="choose another name, or remove it first") from None
    except OSError as error:
        raise UserError(f"cannot write to={to}: {error.strerror}") from None
    if group == "recipe":
        return f"{to} is a copy of recipe {name}: dora-train recipe={to}"
    use = f"as MINE/{group}/NAME.yaml it is chosen by --config-dir MINE {group}=NAME"
    return f"{to} is a copy of {name}; {use}" + _left_behind(group, name.partition("/")[2], folders)


def _left_behind(group: str, name: str, folders: Sequence[Path]) -> str:
    """That values tuned for a pair of data and method go by their names, so that a copy needs a file to have them."""
    for tuned in choices("tuned", folders):
        data, _, method = tuned.rpartition("/")
        own = {"data": data, "method": method}.get(group)
        if own == name:
            file = f"MINE/tuned/NAME/{method}.yaml" if group == "data" else f"MINE/tuned/{data}/NAME.yaml"
            return (
                f"\nWhat was tuned for {group}={name} does not come along: it goes by the name. To have\n"
                f"it all the same, write files such as {file}:\n"
                f"  {HEADER}\n  defaults: [{tuned}]"
            )
    return ""


COPIED = "#   copied from: "


def copied_from(text: str) -> str | None:
    """Of what recipe a text is a copy, by the line that ``copy`` wrote."""
    return next((line.removeprefix(COPIED).strip() for line in text.splitlines() if line.startswith(COPIED)), None)


def _complete(argv: list[str]) -> None:
    command, *typed = argv[2:] or [""]
    for word in words(command, typed[:-1], typed[-1] if typed else ""):
        print(word)


def _one_of(rest: Sequence[str], usage: str, least: int = 1) -> str:
    if not least <= len(rest) <= 1:
        raise UserError(
            f"cannot read '{' '.join(rest)}'" if rest else "a word is missing", hint=f"dora-recipes {usage}"
        )
    return rest[0] if rest else ""


def _name_and_to(rest: Sequence[str]) -> tuple[str, str]:
    names = [word for word in rest if "=" not in word]
    to = [word.removeprefix("to=") for word in rest if word.startswith("to=")]
    if len(names) != 1 or len(to) != 1 or not to[0] or len(rest) != 2:
        raise UserError(f"cannot read 'copy {' '.join(rest)}'", hint="write dora-recipes copy NAME to=FILE.yaml")
    return names[0], to[0]


if __name__ == "__main__":
    sys.exit(main())
