"""From overrides to one typed, checked configuration.

Hydra composes the files. Before it does, every file and override that takes part is held against the bare schema, file
and line at hand, because Hydra alone accepts ``+typo`` and says little about where a mistake stands.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dora_cli.config import record
from dora_cli.config.check import Key, check_config, check_range, check_type, find_key, known_keys, show
from dora_cli.config.layers import Layer, Recipe, find_recipe, group_of, opened
from dora_cli.config.overrides import Override, parse
from dora_cli.config.recipes import GROUPS, check_choice, choices, missing_recipe, search_folders
from dora_cli.config.schema import PART_GROUPS, Config, part_defaults, part_schema
from dora_cli.config.sources import read
from dora_cli.errors import UserError

Parts = Mapping[str, Mapping[str, type]]  # group → name → the part's dataclass


@dataclass(frozen=True)
class Composed:
    """One run's configuration.

    ``parts`` holds the five built parts and ``names`` their names, by group; ``dropped`` says which options from files
    the chosen parts do not read; ``yaml`` is the text of ``RUN/config.yaml``; ``tuned`` holds by key what was tuned for
    this pair of data and method, and ``preset`` what the method's file says, whether it is used or not; ``origin`` says
    by key where its last value stands (None: on the command line), and holds no key that has its default.
    """

    config: Config
    parts: dict[str, Any]
    names: dict[str, str]
    recipe: str
    method: str
    dropped: list[str]
    yaml: str
    data: str = ""
    tuned: dict[str, Any] = field(default_factory=dict)
    preset: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str | None] = field(default_factory=dict)


def compose(
    overrides: Sequence[str], parts: Parts, config_dirs: Iterable[str | Path] = (), *, to_run: bool = True
) -> Composed:
    """Compose and check the configuration of one run. Changes no folder and no global state of Hydra's.

    Args:
        overrides: command-line overrides, ``recipe=`` among them.
        parts: the parts that may be chosen; ``config`` itself does not import them.
        config_dirs: the user's own folders of recipes and group files; they win over the shipped ones.
        to_run: whether it is to be one run; else it may lack data, or be a sweep, and is only to be looked at.

    Raises:
        UserError: anything that the user can put right, with file and line where it comes from a file.
    """
    config_dirs = list(config_dirs)
    folders = search_folders(config_dirs)
    schema = root_schema(parts)
    keys = known_keys(schema)
    typed = parse(overrides, keys)
    chosen = {o.key: o.value for o in typed if o.key in GROUPS}
    if "recipe" not in chosen:
        raise missing_recipe(folders)
    for group, name in chosen.items():
        check_choice(group, name, folders)
    _check_overrides(typed, keys)
    recipe = find_recipe(chosen["recipe"], folders)
    _check_choices_of_record(recipe, chosen)

    with opened(recipe, schema, folders, [o.line for o in typed if o.key != "recipe"]) as composition:
        layers = composition.layers()
        origin = _check_leaves(layers, typed, keys)
        last = {leaf.key: layer.name for layer in layers for leaf in layer.leaves()}
        methods = [layer for layer in layers if layer.name.startswith("method/")]
        of_method = {(group_of(key), name) for layer in methods for key, name, _ in layer.source.defaults}
        if to_run:
            _check_sweep(layers, typed, recipe)
        cfg = composition.config()

    picked: dict[str, str] = dict(cfg.hydra.runtime.choices)
    root = _typed(cfg, schema, origin)
    values = asdict(root)
    _check_ranges(values, keys, origin)
    given = {o.key: o.value for o in typed}
    names, built, dropped = {}, {}, []
    for group in PART_GROUPS:
        names[group] = name = values[group].pop("name")
        if name not in parts[group]:
            raise UserError(f"unknown {group} '{name}'", where=origin.get(f"{group}.name"))
        if (group, name) not in of_method:
            said = {key for key, layer in last.items() if layer.startswith(("method/", "tuned/")) and key not in given}
            values[group] = meant(group, parts[group][name], values[group], said)
            origin |= {
                key: None for key in said if key.startswith(f"{group}.") and key.partition(".")[2] not in values[group]
            }
        options, unread = part_options(group, name, values[group], parts, given)
        built[group] = build_part(group, parts[group][name], options, origin)
        values[group] = {"name": name, **options}
        dropped += unread
    config = Config(**{f.name: getattr(root, f.name) for f in fields(Config)})
    _expand_home(config)
    if to_run:
        check_config(config, origin.get)

    selected = {"model": picked["model"], "data": picked["data"], **names, "method": picked["method"]}
    folders_typed = [word for folder in config_dirs for word in ("--config-dir", str(folder))]
    text = record.write(recipe.name, selected, values, [*overrides, *folders_typed])
    data, method = picked["data"], picked["method"]
    tuned, preset = _said(f"{data}/{method}", choices("tuned", folders)), _said(method, choices("method", folders))
    return Composed(config, built, names, recipe.name, method, dropped, text, data, tuned, preset, origin)


def root_schema(parts: Parts) -> type:
    """The dataclass of the whole configuration: ``Config`` and the five part groups."""
    groups = {group: part_schema(group, parts[group]) for group in PART_GROUPS}
    return make_dataclass("RootConfig", [(g, s, field(default_factory=s)) for g, s in groups.items()], bases=(Config,))


def _said(name: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """Key → value of what a group's file says, and the others of its group that it names under defaults."""
    if name not in files:
        return {}
    source, values = read(files[name]), dict[str, Any]()
    for key, other, _ in source.defaults:
        if key == other:  # a file to go by, and no choice of another group
            values |= _said(other, files)
    return values | {leaf.key: leaf.value for leaf in source.leaves}


# ---- checks -------------------------------------------------------------------------------------------------------


def _check_choices_of_record(recipe: Recipe, chosen: Mapping[str, str]) -> None:
    if not recipe.is_record:
        return
    for group, name, where in recipe.choices():
        if chosen.get(group, name) != name:
            raise UserError(
                f"{group}={chosen[group]} contradicts this run's configuration, which fixes {group}: {name}",
                where=where,
                hint=f"start from the recipe instead: recipe={recipe.name} {group}={chosen[group]}",
            )


def _check_overrides(typed: Iterable[Override], keys: Mapping[str, Key]) -> None:
    for override in typed:
        if override.key in GROUPS:
            continue
        group, _, option = override.key.partition(".")
        if group in PART_GROUPS and option == "name":
            raise UserError(f"{override.key} cannot be set", hint=f"choose the part by {group}={show(override.value)}")
        check_type(find_key(override.key, keys), override.value)


def _check_leaves(layers: Iterable[Layer], typed: Iterable[Override], keys: Mapping[str, Key]) -> dict[str, str | None]:
    """Hold every key and value of every file against the schema.

    Returns:
        Key → where its last value stands; None means the command line.
    """
    origin: dict[str, str | None] = {}
    part_names: dict[str, str] = {}
    for layer in layers:
        for leaf in layer.leaves():
            check_type(find_key(leaf.key, keys, leaf.where), leaf.value, leaf.where)
            origin[leaf.key] = leaf.where
            group, _, option = leaf.key.partition(".")
            if group not in PART_GROUPS or option != "name":
                continue
            if layer.name.startswith(f"{group}/"):
                part_names[group] = leaf.value
            elif leaf.value != part_names.get(group):
                raise UserError(
                    f"this file says {leaf.key}: {leaf.value}, but {group}={part_names.get(group)} is chosen",
                    where=leaf.where,
                    hint=f"remove the line, and choose by {group}=NAME or under defaults",
                )
    return origin | {override.key: None for override in typed}


def _check_sweep(layers: Iterable[Layer], typed: Iterable[Override], recipe: Recipe) -> None:
    """A recipe may say what ``-m`` sweeps over; without ``-m`` (or values for those keys) it is not one run."""
    given = {override.key for override in typed}
    for layer in layers:
        unset = {key: leaf for key, leaf in layer.sweep().items() if key not in given}
        if unset:
            where = next(iter(unset.values())).where
            raise UserError(f"recipe {recipe.name} is a sweep over {', '.join(unset)}", where=where, hint="add -m")


def _typed(cfg: DictConfig, schema: type, origin: Mapping[str, str | None]) -> Any:
    """The configuration merged into the bare schema once more and resolved: an instance of ``schema``."""
    try:
        bare = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        merged = OmegaConf.merge(OmegaConf.structured(schema), bare)
        for name in OmegaConf.missing_keys(merged):
            raise UserError(f"{name} is not set", where=origin.get(name), hint=f"set it: {name}=…")
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        name = error.full_key or "the configuration"
        raise UserError(f"cannot resolve {name}: {str(error).splitlines()[0]}", where=origin.get(name)) from error


def _check_ranges(values: Mapping[str, Any], keys: Mapping[str, Key], origin: Mapping[str, str | None]) -> None:
    for name, key in keys.items():
        value: Any = values
        for part in name.split("."):
            value = value[part]
        check_type(key, value, origin.get(name))  # what an interpolation has become
        check_range(key, value, origin.get(name))


def meant(group: str, part: type, values: Mapping[str, Any], said: Iterable[str]) -> dict[str, Any]:
    """A part's options without those that a method says (``said``, keys) of the part that it chose itself, where the
    part declares that they hold for no other (``own``)."""
    aside = {key for key in said if key.partition(".")[2] in getattr(part, "own", ())}
    return {option: value for option, value in values.items() if f"{group}.{option}" not in aside}


def part_options(
    group: str, name: str, values: Mapping[str, Any], parts: Parts, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The part's options with its own defaults filled in, and a line for each option from a file that it does not read.

    Raises:
        UserError: an option ``given`` on the command line that the part does not read.
    """
    own = part_defaults(parts[group][name])
    dropped = []
    for option, value in values.items():
        key = f"{group}.{option}"
        if value is None or option in own:
            continue
        text = f"{key}={show(given.get(key, value))}: {group}={name} does not read it"
        if key in given:
            readers = ", ".join(n for n, part in parts[group].items() if option in part_defaults(part))
            reads = ", ".join(f"{group}.{o}" for o in own) or "no options"
            raise UserError(text, where=f"{group}={name} reads {reads}", hint=f"{key} is read by {readers}")
        dropped.append(text)
    return own | {o: v for o, v in values.items() if o in own and v is not None}, dropped


def build_part(group: str, part: type, options: Mapping[str, Any], origin: Mapping[str, str | None]) -> Any:
    """Check the options against the part's own types and ranges, and make the part."""
    hints = get_type_hints(part)
    for f in fields(part):
        key, where = Key(f"{group}.{f.name}", hints[f.name], f.metadata), origin.get(f"{group}.{f.name}")
        check_type(key, options[f.name], where)
        check_range(key, options[f.name], where)
    try:
        return part(**options)
    except UserError as error:
        if error.where is None:  # a rule of the part's own: it names the key, and we know where that stands
            named = re.findall(rf"\b{group}\.\w+", error.message)
            error.where = next((where for key in named if (where := origin.get(key))), None)
        raise


def _expand_home(config: Config) -> None:
    """A shell leaves ``~`` alone behind ``out=``."""
    for owner, attribute in ((config, "out"), (config.data, "path"), (config.model, "name")):
        value = getattr(owner, attribute)
        if value and value.startswith("~"):
            setattr(owner, attribute, str(Path(expanduser(value))))
