"""The options of parts for help and completion, read from the source of their classes: importing those takes torch."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dora_cli.registry import part_table


@dataclass(frozen=True)
class PartKey:
    """One option of the parts of a group: its key, what its dataclass fields say, and the parts that read it.

    ``defaults`` holds each reader's own default by the part's name, ``hint`` the type as it is written.
    """

    name: str
    hint: str
    meta: dict[str, Any]
    defaults: dict[str, Any]


@dataclass(frozen=True)
class _Option:
    hint: str
    default: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Module:
    """A file: its classes, what its names are assigned, and from where its other names come (name → module)."""

    classes: dict[str, ast.ClassDef]
    values: dict[str, ast.expr]
    origin: dict[str, str]


def part_keys(group: str) -> dict[str, PartKey]:
    """Every option of a group's parts, by key; what it says is what the first part that reads it says."""
    found: dict[str, PartKey] = {}
    for part, place in part_table(group).items():
        module, _, name = place.partition(":")
        for option, said in _options(module, name).items():
            key = f"{group}.{option}"
            known = found.setdefault(key, PartKey(key, said.hint, said.meta, {}))
            known.defaults[part] = said.default
    return found


def part_sentences(group: str) -> dict[str, str]:
    """Part → the first line of what its class says of itself."""
    found = {}
    for part, place in part_table(group).items():
        module, _, name = place.partition(":")
        node = _read(module).classes.get(name)
        said = ast.get_docstring(node) if node is not None else None
        found[part] = " ".join((said or "").partition("\n\n")[0].split())
    return found


@cache
def _read(module: str) -> _Module:
    package, _, name = module.rpartition(".")
    spec = find_spec(package)  # a package imports nothing by itself
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0])
    file = path / f"{name}.py" if (path / f"{name}.py").exists() else path / name / "__init__.py"
    classes: dict[str, ast.ClassDef] = {}
    values: dict[str, ast.expr] = {}
    origin: dict[str, str] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            classes[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dora_cli."):
            origin |= {alias.name: node.module or "" for alias in node.names}
    return _Module(classes, values, origin)


def _options(module: str, name: str) -> dict[str, _Option]:
    """The fields of a dataclass, those of its bases first, as ``dataclasses.fields`` would give them."""
    known = _read(module)
    if name not in known.classes:
        return _options(known.origin[name], name) if name in known.origin else {}
    node = known.classes[name]
    found: dict[str, _Option] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            found |= _options(module, base.id)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        for option, hint, value in _fields(node):
            if hint.startswith("ClassVar"):
                found.pop(option, None)  # a constant of the class is no key
            else:
                found[option] = _option(module, hint, value)
    return found


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, ast.expr | None]]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.target.id, ast.unparse(item.annotation), item.value


def _option(module: str, hint: str, value: ast.expr | None) -> _Option:
    alias = _lookup(module, hint) if hint.isidentifier() else None
    hint = ast.unparse(alias) if alias is not None else hint
    if not isinstance(value, ast.Call):
        return _Option(hint, _value(module, value), {})
    words = {keyword.arg: keyword.value for keyword in value.keywords}
    default = words.get("default")
    if isinstance(factory := words.get("default_factory"), ast.Lambda):
        default = factory.body
    meta = words.get("metadata")
    pairs = zip(meta.keys, meta.values, strict=True) if isinstance(meta, ast.Dict) else ()
    return _Option(hint, _value(module, default), {_value(module, k): _value(module, v) for k, v in pairs})


def _value(module: str, node: ast.expr | None) -> Any:
    """A literal, or the name of one."""
    if isinstance(node, ast.Name):
        return _value(module, _lookup(module, node.id))
    return None if node is None else ast.literal_eval(node)


def _lookup(module: str, name: str) -> ast.expr | None:
    known = _read(module)
    if name in known.origin:
        return _lookup(known.origin[name], name)
    return known.values.get(name)
