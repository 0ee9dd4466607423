"""The five parts of a method, loaded: configuration does not import them itself."""

from dora_cli.registry import PART_TABLES, load, part_table


def load_parts() -> dict[str, dict[str, type]]:
    """Group → name → the part's dataclass. Imports torch."""
    tables = {group: part_table(group) for group in PART_TABLES}
    return {group: {name: load(table, name, key=group) for name in table} for group, table in tables.items()}
