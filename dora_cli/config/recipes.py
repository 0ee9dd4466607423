"""Where recipes lie and what they offer. Imports the standard library only: help and typos are answered from here."""

from collections.abc import Iterable, Mapping, Sequence
from os.path import expanduser, isdir, isfile
from pathlib import Path

from dora_cli.config.schema import PART_GROUPS
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean, part_table

GROUPS = ("recipe", "method", "model", "data", *PART_GROUPS)
GLOBAL_GROUPS = ("recipe", "method", "tuned")  # their files speak of the whole configuration, not of their own group
HEADER = "# @package _global_"


def recipes_dir() -> Path:
    """The shipped recipes: inside an installed package, beside it in a checkout (editable installs included)."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def search_folders(config_dirs: Iterable[str | Path] = ()) -> list[Path]:
    """Folders that may hold recipes and group files, the user's first: the first one that has a name wins.

    Raises:
        UserError: one of ``config_dirs`` is not a folder.
    """
    folders = [Path(expanduser(d)) for d in config_dirs]
    for folder in folders:
        if not isdir(folder):
            raise UserError(f"--config-dir {folder} is not a folder")
    return [folder.resolve() for folder in folders] + [recipes_dir()]


def choices(group: str, folders: Sequence[Path]) -> dict[str, Path]:
    """Name → file of everything that ``group`` offers; a name may contain slashes (``glue/sst2``)."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted((folder / group).rglob("*.yaml")):
            found.setdefault(path.relative_to(folder / group).with_suffix("").as_posix(), path)
    return dict(sorted(found.items()))


def offered(group: str, folders: Sequence[Path]) -> list[str]:
    """Every name that ``group`` offers: files, and parts, which need no file to be chosen."""
    return sorted({*choices(group, folders), *part_table(group)})


def check_choice(group: str, name: str, folders: Sequence[Path], where: str | None = None) -> None:
    """Refuse a name that ``group`` does not offer, with its neighbours. A recipe may also be a file.

    Raises:
        UserError: there is no such choice, or no such recipe file.
    """
    if group == "recipe" and is_file(name):
        if not isfile(expanduser(name)):
            raise UserError(f"recipe={name}: there is no such file", where=where)
        return
    names = offered(group, folders)
    if name not in names:
        config = Path(expanduser(name)) / "config.yaml"
        if group == "recipe" and isfile(config):
            raise UserError(f"recipe={name} is a folder", where=where, hint=f"did you mean recipe={config}?")
        raise UserError(f"unknown {group} '{name}'", where=where, hint=did_you_mean(name, names))


def check_names(overrides: Iterable[str], folders: Sequence[Path]) -> None:
    """Refuse mistyped choices among command-line overrides, before anything slow is imported.

    Only plain ``group=name`` (or ``group=name,name``) is looked at; everything else is for the full parser.

    Raises:
        UserError: an unknown name.
    """
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        if group in GROUPS and value and not set(value) & set("()[]{}'\"$"):
            for name in [value] if isfile(expanduser(value)) else value.split(","):
                check_choice(group, name.strip(), folders)


def is_file(recipe: str) -> bool:
    """Whether ``recipe=`` means a file rather than a name."""
    return recipe.endswith((".yaml", ".yml"))


def missing_recipe(folders: Sequence[Path]) -> UserError:
    """The answer to a command without ``recipe=``."""
    names = ", ".join(choices("recipe", folders))
    return UserError(
        "no recipe is given",
        hint=f"say recipe=NAME or recipe=FILE.yaml   (all: {names}); a run goes on with all the words it began with",
    )


def sentence(path: Path) -> str:
    """What help says about a YAML file: its first comment that is not Hydra's package header."""
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                text = line.lstrip("# ").strip()
                if not line.startswith("#"):
                    break
                if text and not text.startswith("@"):
                    return text
    except (OSError, UnicodeDecodeError):
        pass  # help must not fail on a file that it only describes
    return ""


def sentences(group: str, folders: Sequence[Path]) -> Mapping[str, str]:
    """Name → sentence of everything that ``group`` offers."""
    return {name: sentence(path) for name, path in choices(group, folders).items()}
