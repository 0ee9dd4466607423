"""Rows of new tokens, as PEFT's ``trainable_token_indices`` saves them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_cli.checkpoints.adapter_format import PREFIX, TOKENS
from dora_cli.checkpoints.safetensors_io import FLOATS, Entry
from dora_cli.errors import UserError

KEY = "trainable_token_indices"
WHOLE = ".token_adapter.base_layer.weight"  # which PEFT saves too where embeddings were resized


@dataclass(frozen=True)
class TokenUpdate:
    """Where the rows of some tokens lie in the file: they take the place of the base's, or follow on them."""

    name: str  # of the module
    ids: list[int]
    rows: Entry  # (len(ids), d)
    size: int = 0  # rows of the whole embedding, where the file says


def take_tokens(config: dict[str, Any], entries: dict[str, Entry], file: Path) -> dict[str, TokenUpdate]:
    """Full module name → its rows; their entries are taken out of ``entries``.

    PEFT's setting is a list, for the input embedding, or a list for each module, which it knows by the end of its name.

    Raises:
        UserError: the setting and the tensors do not agree.
    """
    found = {key.removeprefix(PREFIX).removesuffix(f".{TOKENS}"): key for key in entries if key.endswith(f".{TOKENS}")}
    setting = config.get(KEY)
    updates: dict[str, TokenUpdate] = {}
    for name, key in found.items():
        ids: Any = setting
        if isinstance(setting, dict):
            ids = next((ids for end, ids in setting.items() if f".{name}".endswith(f".{end}")), None)
        entry = entries.pop(key)
        fits = (
            isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids) and len(set(ids)) == len(ids)
        )
        if not fits or len(entry.shape) != 2 or entry.shape[0] != len(ids) or entry.dtype not in FLOATS:
            raise UserError(
                f"{file.parent} is damaged",
                where=f"'{key}' has the shape {list(entry.shape)} and the type {entry.dtype}, and {KEY} is {ids}",
            )
        updates[name] = TokenUpdate(name, ids, entry)
    for key in [key for key in entries if key.endswith(WHOLE)]:
        name, whole = key.removeprefix(PREFIX).removesuffix(WHOLE), entries.pop(key)
        if name in updates:
            updates[name] = replace(updates[name], size=whole.shape[0])
    if setting and not found:
        raise UserError(f"{file.parent} is damaged", where=f"{KEY} is set, but there are no rows of tokens")
    return updates
