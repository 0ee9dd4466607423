"""The five parts of a method, loaded: configuration does not import them itself."""

from dora_cli.adapters import ADAPTERS
from dora_cli.allocation import ALLOCATORS, IMPORTANCES, REGULARIZERS, SCHEDULES
from dora_cli.registry import load

TABLES = {
    "adapter": ADAPTERS,
    "importance": IMPORTANCES,
    "schedule": SCHEDULES,
    "allocator": ALLOCATORS,
    "regularizer": REGULARIZERS,
}


def load_parts() -> dict[str, dict[str, type]]:
    """Group → name → the part's dataclass. Imports torch."""
    return {group: {name: load(table, name, key=group) for name in table} for group, table in TABLES.items()}
