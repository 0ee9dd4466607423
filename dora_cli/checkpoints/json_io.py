"""JSON files from outside: read whole, checked for their shape, refused by name."""

import json
from pathlib import Path
from typing import Any

from dora_cli.errors import UserError

REQUIRED: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else than an object.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, endless digits, endless nesting
        raise UserError(f"{path} is damaged", where=f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged", where=f"expected a JSON object, found {_kind(value)}")
    return value


def take(table: dict[str, Any], key: str, kinds: type | tuple[type, ...], path: Path, default: Any = REQUIRED) -> Any:
    """``table[key]`` if it has one of ``kinds``; ``default`` where it is absent or null.

    Raises:
        UserError: absent without a default, or of another kind, naming file and key.
    """
    value = table.get(key)
    if value is None and default is not REQUIRED:
        return default
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{path} is damaged", where=f"'{key}' should be {wanted}, found {_kind(value)}")
    return value


def strings(table: dict[str, Any], key: str, path: Path) -> list[str]:
    """``table[key]`` as a list of strings; empty where it is absent or null.

    Raises:
        UserError: of another kind, naming file and key.
    """
    values = take(table, key, list, path, [])
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{path} is damaged", where=f"'{key}' should be a list of strings")
    return values


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
