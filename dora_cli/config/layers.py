"""The files that make up one run, in Hydra's order, each with its lines; and Hydra's own composition of them."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dora_cli.config import record
from dora_cli.config.overrides import quote
from dora_cli.config.recipes import GLOBAL_GROUPS, GROUPS, HEADER, check_choice, choices, is_file, recipes_dir
from dora_cli.config.sources import SWEEP, Leaf, Source, place, read
from dora_cli.errors import UserError
from dora_cli.registry import PART_TABLES, part_table

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError, RecursionError, yaml.YAMLError)


@dataclass(frozen=True)
class Recipe:
    """The recipe of a run: ``stem`` is what Hydra calls it, ``name`` what the run is called after.

    ``is_record`` where it is the ``config.yaml`` of a run, which fixes every value.
    """

    stem: str
    name: str
    source: Source
    is_record: bool

    def choices(self) -> Iterator[tuple[str, str, str]]:
        """What its defaults list chooses, as (group, name, where)."""
        return ((group_of(key), name, where) for key, name, where in self.source.defaults)


@dataclass(frozen=True)
class Layer:
    """One file that takes part: its path within the search folders (``method/dora``) and the package of its keys."""

    name: str
    package: str
    source: Source

    def leaves(self) -> Iterator[Leaf]:
        """Its values by full key, sweep ranges left out."""
        prefix = f"{self.package}." if self.package else ""
        for leaf in self.source.leaves:
            if not leaf.key.startswith(SWEEP):
                yield Leaf(prefix + leaf.key, leaf.value, leaf.where)

    def sweep(self) -> dict[str, Leaf]:
        """Key → range that ``-m`` sweeps over, where the file is a sweep (``hydra.sweeper.params``)."""
        return {leaf.key.removeprefix(SWEEP): leaf for leaf in self.source.leaves if leaf.key.startswith(SWEEP)}


def group_of(key: str) -> str:
    """``schedule`` of the defaults entry ``override /schedule``."""
    return key.split()[-1].split("@")[0].lstrip("/")


def find_recipe(name: str, folders: Sequence[Path]) -> Recipe:
    """Read the recipe that ``recipe=name`` means.

    Raises:
        UserError: unknown, unreadable or malformed.
    """
    check_choice("recipe", name, folders)
    if not is_file(name):
        return Recipe(name, name, read(choices("recipe", folders)[name]), is_record=False)
    path = Path(expanduser(name))
    source = read(path)
    original = record.recipe_of(source.text)
    return Recipe(re.sub(r"[^\w.-]", "_", path.stem), original or path.stem, source, original is not None)


class Composition:
    """Hydra, set up for one run. Use as ``with opened(...) as composition``."""

    def __init__(self, top: Path, recipe: Recipe, folders: Sequence[Path], lines: list[str]) -> None:
        self.top, self.recipe, self.folders, self.lines = top, recipe, folders, lines

    def layers(self) -> list[Layer]:
        """Every file that takes part, in order: later ones beat earlier ones.

        Raises:
            UserError: a defaults list asks for what there is not, or a file is malformed.
        """
        self._check_defaults()
        loader = GlobalHydra.instance().config_loader()
        try:
            defaults = loader.compute_defaults_list("config", self.lines, RunMode.RUN).defaults
        except COMPOSITION_ERRORS as error:
            for folder in self.folders[:-1]:  # a broken file of the user's may be what Hydra stumbled over
                for file in sorted(folder.rglob("*.yaml")):
                    read(file)
            raise self._refusal(error) from error
        return [layer for default in defaults if (layer := self._layer(default))]

    def config(self) -> DictConfig:
        """Hydra's configuration, its own node included.

        Raises:
            UserError: with Hydra's words, where ours did not catch it before.
        """
        try:
            return compose("config", self.lines, return_hydra_config=True)
        except COMPOSITION_ERRORS as error:
            raise self._refusal(error) from error

    def _layer(self, default: ResultDefault) -> Layer | None:
        name, package = default.config_path or "", default.package or ""
        if name == f"recipe/{self.recipe.stem}":
            source = self.recipe.source
        else:
            candidates = (folder / f"{name}.yaml" for folder in [self.top, *self.folders])
            file = next((candidate for candidate in candidates if candidate.is_file()), None)
            if name.startswith("hydra/") or file is None:
                return None
            source = read(file)
        if name.split("/")[0] in GLOBAL_GROUPS and package:
            hint = "without it no key is where it belongs"
            raise UserError(f"line 1 must be '{HEADER}'", where=place(source.path), hint=hint)
        return Layer(name, package, source)

    def _check_defaults(self) -> None:
        """Hydra's answers to a recipe that chooses in the wrong form, or what there is not, name no line."""
        packages = set(re.findall(r"^\s*#\s*@package\s+(\S+)", self.recipe.source.text, re.MULTILINE))
        if packages - {"_global_"}:
            raise UserError(f"line 1 must be '{HEADER}'", where=place(self.recipe.source.path, 1))
        for key, name, where in self.recipe.source.defaults:
            group = group_of(key)
            if group not in GROUPS or key == name:
                continue
            if key.split() != ["override", f"/{group}"]:
                raise UserError(
                    f"cannot read '{key}: {name}'", where=where, hint=f"write '- override /{group}: {name}'"
                )
            if "$" not in name and not self.recipe.is_record:
                check_choice(group, name, self.folders, where)

    def _refusal(self, error: Exception) -> UserError:
        """Hydra's refusal in our words, with the line that asks for what it cannot find."""
        if isinstance(error, RecursionError):
            wheres = [where for *_, where in self.recipe.source.defaults]
            return UserError(
                f"the defaults of recipe {self.recipe.name} lead back to themselves",
                where=wheres[0] if wheres else place(self.recipe.source.path),
                hint="a recipe may name others under defaults, but not one that names it",
            )
        missing = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
        if missing:
            others = (file for folder in self.folders for file in sorted(folder.rglob("*.yaml")))
            for source in (self.recipe.source, *map(read, others)):
                for key, name, where in source.defaults:
                    if missing == f"{group_of(key)}/{name}" and group_of(key) in GROUPS:
                        check_choice(group_of(key), name, self.folders, where)
                    if missing in (name, f"recipe/{name}"):
                        return UserError(f"there is no '{missing}'", where=where)
        words = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return UserError(words[0], where=" ".join(words[1:3]) or place(self.recipe.source.path))


@contextmanager
def opened(recipe: Recipe, schema: type, folders: Sequence[Path], lines: Sequence[str]) -> Iterator[Composition]:
    """Set Hydra up for one run and take it down again; its global state and the working directory are left alone.

    Args:
        recipe: staged in a temporary folder that wins over all others, so that it may lie anywhere.
        schema: dataclass of the whole configuration, the first entry of the primary defaults list.
        folders: where group files lie, the first one winning.
        lines: overrides in Hydra's grammar, ``recipe=`` left out.
    """
    with TemporaryDirectory(prefix="dora-config-") as top:
        _stage(Path(top), recipe, folders)
        search = ",".join(quote(f"file://{folder}") for folder in folders)
        ConfigStore.instance().store("schema", schema)
        with initialize_config_dir(top, job_name="dora-train", version_base="1.3"):
            all_lines = [*lines, f"recipe={quote(recipe.stem)}", f"hydra.searchpath=[{search}]"]
            _read_once(GlobalHydra.instance().config_loader())
            yield Composition(Path(top), recipe, folders, all_lines)


def _read_once(loader: Any) -> None:
    """Let the list of layers and the composition share the files as read; Hydra by itself would read them twice."""
    read_all = loader._parse_overrides_and_create_caching_repo
    known: list[Any] = []

    def once(*arguments: Any) -> Any:
        if not known:
            known.append(read_all(*arguments))
        return known[0]

    loader._parse_overrides_and_create_caching_repo = once


def _stage(top: Path, recipe: Recipe, folders: Sequence[Path]) -> None:
    """Write what must win over every other folder: our primary configuration, and the recipe with its header.

    A part's file would say nothing but its name, so it is written here, unless someone has one of their own.
    """
    for group in PART_TABLES:
        for name in set(part_table(group)) - set(choices(group, folders)):
            _write(top, f"{group}/{name}", f"name: {name}\n")
    shutil.copyfile(recipes_dir() / "config.yaml", top / "config.yaml")
    text = recipe.source.text
    if not re.match(r"\s*#\s*@package\b", text):
        text = f"{HEADER}\n{text}"
    _write(top, f"recipe/{recipe.stem}", text)
    if recipe.is_record:
        # A record holds every value. Empty stand-ins keep what it was made from (perhaps changed or gone) out of it.
        picked: Mapping[str, str] = {group: name for group, name, _ in recipe.choices()}
        model, data, method = (picked.get(group, "none") for group in ("model", "data", "method"))
        _write(top, f"model/{model}", "{}\n")
        _write(top, f"data/{data}", "{}\n")
        _write(top, f"method/{method}", f"{HEADER}\n{{}}\n")
        _write(top, f"tuned/{data}/{method}", f"{HEADER}\n{{}}\n")


def _write(top: Path, name: str, text: str) -> None:
    path = (top / f"{name}.yaml").resolve()
    if not path.is_relative_to(top.resolve()):
        raise UserError(f"'{name}' names a choice outside its folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
