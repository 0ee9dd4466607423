"""A method without a recipe: its preset's five parts, for a training loop that is not ours."""

from collections.abc import Mapping
from typing import Any

from yaml import safe_load

from dora_cli.config.check import check_type, find_key, known_keys, show
from dora_cli.config.compose import Composed, Parts, build_part, meant, part_options, root_schema
from dora_cli.config.recipes import check_choice, choices, recipes_dir
from dora_cli.config.schema import PART_GROUPS, Config
from dora_cli.errors import UserError


def from_preset(
    method: str,
    parts: Parts,
    chosen: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    budget: Any = None,
    seed: int = 1,
    export: str = "exact",
) -> Composed:
    """The parts of ``recipes/method/METHOD.yaml``, some of them replaced, as ``dora-train`` would build them.

    What the preset says of training (learning rate, warm-up, …) is the loop's own business.

    Args:
        method: the preset's name.
        parts: the parts that may be chosen, group → name → class.
        chosen: group → the name of a part, or a part that is built already; those that the preset's are not.
        options: ``GROUP.OPTION`` → value, as on the command line.

    Raises:
        UserError: an unknown method, part or option, or a value that is none for it.
    """
    folders = [recipes_dir()]
    check_choice("method", method, folders)
    text = choices("method", folders)[method].read_text(encoding="utf-8")
    preset: dict[str, Any] = safe_load(text)
    names = {line.split("/")[1]: name for entry in preset["defaults"] for line, name in entry.items()}
    keys = {k: v for k, v in known_keys(root_schema(parts)).items() if k.partition(".")[0] in PART_GROUPS}
    for name, value in options.items():
        if name.endswith(".name"):
            raise UserError(f"{name} cannot be set", hint=f"choose the part by {name.partition('.')[0]}={show(value)}")
        check_type(find_key(name, keys), value)
    built, dropped = {}, []
    for group in PART_GROUPS:
        part = chosen.get(group, names[group])
        given = {name: value for name, value in options.items() if name.startswith(f"{group}.")}
        if not isinstance(part, str):
            if given:
                raise UserError(f"{next(iter(given))} is set, and so is a {group} that has all its options already")
            names[group] = next((n for n, kind in parts[group].items() if type(part) is kind), type(part).__name__)
            built[group] = part
            continue
        check_choice(group, part, folders)
        values = dict(preset.get(group, {}))
        if part != names[group]:
            values = meant(group, parts[group][part], values, {f"{group}.{option}" for option in values})
        values |= {name.partition(".")[2]: value for name, value in given.items()}
        filled, unread = part_options(group, part, values, parts, given)
        names[group], built[group] = part, build_part(group, parts[group][part], filled, {})
        dropped += unread
    config = Config(budget=budget, seed=seed, export=export)
    origin: dict[str, str | None] = dict.fromkeys(options, None) | ({"budget": None} if budget is not None else {})
    return Composed(config, built, names, "", method, dropped, "", origin=origin)
