"""Two configurations, key by key."""

from collections.abc import Mapping
from typing import Any

from yaml import YAMLError, safe_load

# What may differ between an interrupted run and its resumption: logging, saving, workers, cache, how it was called.
FREE_ON_RESUME = (
    *("out", "resume", "overwrite", "dry_run", "offline", "save.merged", "save.report"),
    *("train.log_every", "train.save_every", "train.keep_last", "train.workers", "train.max_skipped"),
    *("data.cache", "train.timeout", "train.shard", "track"),
)


def differences(yaml: str, other: str, free: tuple[str, ...] = ()) -> list[str]:
    """``key: a → b`` for each key of two configuration files that differs, but for ``free`` ones."""
    old, new = flat(read_configuration(yaml), free), flat(read_configuration(other), free)
    return [
        f"{key}: {old.get(key)} → {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def flat(config: Mapping[str, Any], free: tuple[str, ...] = ()) -> dict[str, Any]:
    """Dotted key → value of a nested configuration, without those keys that begin like ``free`` ones."""
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        elif not (free and prefix.startswith(free)):
            found[prefix] = node

    walk(config, "")
    return found


def read_configuration(text: str) -> dict[str, Any]:
    """A configuration file without its defaults list."""
    content = safe_load(text)
    if not isinstance(content, dict):
        raise YAMLError("no mapping")
    content.pop("defaults", None)
    return content
