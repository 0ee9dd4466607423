"""Hydra's own keys of a sweep, read from the command line and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dora_cli.config.check import check_range, check_type, known_keys, unknown_key
from dora_cli.config.overrides import parse, split
from dora_cli.config.sweeps import GROUPS, LAUNCHERS, SWEEPERS, Optuna, Sampler
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean


@dataclass(frozen=True)
class Launching:
    """What the keys came to: names, and the options of each in its dataclass."""

    launcher: str
    options: Any
    sampler: str
    search: Optuna | None  # None: every combination


def take(overrides: Sequence[str]) -> tuple[Launching, list[str]]:
    """Take Hydra's own keys out of a sweep's overrides.

    Raises:
        UserError: an unknown name or key, an option of another launcher, a value that does not fit.
    """
    mine = [o for o in overrides if o.lstrip("+").startswith(("hydra/", "hydra."))]
    rest = [o for o in overrides if o not in mine]
    names = {"hydra/launcher": "basic", "hydra/sweeper": "basic", "hydra/sweeper/sampler": "tpe"}
    options = []
    for override in mine:
        name, value = split(override)
        if name in GROUPS:
            if value not in GROUPS[name]:
                raise UserError(f"unknown {name} '{value}'", hint=did_you_mean(value, GROUPS[name]))
            names[name] = value
        elif "/" in name:
            raise UserError(f"unknown key '{name}'", hint=did_you_mean(name, GROUPS))
        else:
            options.append(override)
    launcher, sweeper = names["hydra/launcher"], names["hydra/sweeper"]
    if sweeper == "basic" and any(split(o)[0] == "hydra/sweeper/sampler" for o in mine):
        raise UserError("hydra/sweeper/sampler is optuna's", hint="add hydra/sweeper=optuna")
    values = _values(options, launcher, sweeper)
    search = None
    if sweeper == "optuna":
        seed = values["hydra.sweeper"].pop("sampler", {})
        search = Optuna(**values["hydra.sweeper"], sampler=Sampler(**seed))
    chosen = LAUNCHERS[launcher](**values["hydra.launcher"])
    return Launching(launcher, chosen, names["hydra/sweeper/sampler"], search), rest


def _values(options: Sequence[str], launcher: str, sweeper: str) -> dict[str, dict[str, Any]]:
    """The options as typed, checked: part → option → value."""
    keys = known_keys(LAUNCHERS[launcher], "hydra.launcher.") | known_keys(SWEEPERS[sweeper], "hydra.sweeper.")
    for option in options:
        name = split(option)[0]
        if name not in keys:
            _refuse(name, keys, launcher, sweeper)
    values: dict[str, dict[str, Any]] = {"hydra.launcher": {}, "hydra.sweeper": {}}
    for override in parse(options, keys):
        check_type(keys[override.key], override.value)
        check_range(keys[override.key], override.value)
        part, _, option = override.key.rpartition(".")
        if part == "hydra.sweeper.sampler":
            values["hydra.sweeper"]["sampler"] = {option: override.value}
        else:
            values[part][option] = override.value
    return values


def _refuse(name: str, keys: dict[str, Any], launcher: str, sweeper: str) -> None:
    for group, table, chosen in (("launcher", LAUNCHERS, launcher), ("sweeper", SWEEPERS, sweeper)):
        readers = [n for n, schema in table.items() if name in known_keys(schema, f"hydra.{group}.")]
        if readers:
            asked = " or ".join(f"hydra/{group}={n}" for n in readers)
            raise UserError(f"hydra/{group}={chosen} does not read {name}", hint=f"it is read by {asked}")
    raise unknown_key(name, keys)
