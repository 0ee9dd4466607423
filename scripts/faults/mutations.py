"""Hypothesis strategies that spoil valid inputs: bytes, nested structures, words of a command line."""

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Path = tuple[Any, ...]
ByteEdit = tuple[str, int, bytes]
Edit = tuple[str, int, Any]

NUMBERS = [
    0, -1, 1, 2, 3.5, -0.0, 1e-320, 1e39, 1e308, float("inf"), float("-inf"), float("nan"), 2**31, 2**53 + 1, 2**63,
    2**64, 10**20, 10**400,
]  # fmt: skip
TEXTS = [
    "", " ", "null", "true", "nan", "1e400", "0x10", "2020-01-01", "12:30", "2020-01-01T12:00:00Z", "../../etc/passwd",
    "/dev/null", "~nobody/x", "a\0b", "\ud800", "\ufeff", "\u2028", "\x0b", "\r", "\n" * 9, "é\u202e😀", "(", "(a|a)*$",
    "[a-", "*", "${seed}", "${", "???", "__class__", "x" * 3000, "9" * 5000, "word " * 400, "[" * 900 + "]" * 900,
]  # fmt: skip
SPLICES = [
    b"", b"\0", b"\r", b"\n", b"\r\n", b"\n\n", b"\xef\xbb\xbf", b"\xff", b"\xc3", b'"', b"'", b",", b"\t", b"\\", b"{",
    b"}", b"[", b"]", b":", b" ", b"null", b"NaN", b"-Infinity", b"1e400", b"-", b"1" + b"0" * 30, b"9" * 5000, b"0x1",
    b"\\ud800", b"\\u0000", b'"a": 1, ', b"[" * 3000, b'{"a":' * 3000, b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x0b",
    b"\x1e", b"\x85", b"# ", b"&a *a", b"!!binary ", b"${", b"\xff" * 8, bytes(64),
]  # fmt: skip
BYTE_EDITS = ("flip", "insert", "overwrite", "delete", "repeat", "move", "cut", "crlf")


def odd_values() -> st.SearchStrategy[Any]:
    """What nobody expects where something else stands: JSON values of every kind, small, large and nested."""
    plain = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=8)
    nested = st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    )
    return plain | nested | st.just(deep(200))


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


# ---- bytes ---------------------------------------------------------------------------------------------------------
def byte_edits(most: int = 4) -> st.SearchStrategy[list[ByteEdit]]:
    payload = st.sampled_from(SPLICES) | st.binary(min_size=1, max_size=4)
    return st.just([]) | st.lists(st.tuples(st.sampled_from(BYTE_EDITS), st.integers(0, 4095), payload), max_size=most)


def edit_bytes(content: bytes, edits: list[ByteEdit]) -> bytes:
    """``content`` after all edits; a place past its end is taken modulo its length."""
    for kind, number, payload in edits:
        at = number % (len(content) + 1)
        far = at + 1 + number // 7 % 40
        before, here, after = content[:at], content[at:far], content[far:]
        if kind == "flip":
            content = before + bytes(b ^ 1 << number % 8 for b in here[:1]) + here[1:] + after
        elif kind == "insert":
            content = before + payload + here + after
        elif kind == "overwrite":
            content = before + payload + content[at + len(payload) :]
        elif kind == "delete":
            content = before + after
        elif kind == "repeat":
            content = before + here + here + after
        elif kind == "move":
            content = here + before + after
        else:
            content = before if kind == "cut" else content.replace(b"\n", b"\r\n")
    return content


# ---- structures ----------------------------------------------------------------------------------------------------
def edits(most: int = 4) -> st.SearchStrategy[list[Edit]]:
    kinds = st.sampled_from(("replace", "delete", "add", "wrap", "rename", "swap"))
    return st.just([]) | st.lists(st.tuples(kinds, st.integers(0, 255), odd_values()), max_size=most)


def edit(value: Any, changes: list[Edit]) -> Any:
    """A copy of a nest of dicts and lists with each change made at one of its places."""
    root = {"root": copy.deepcopy(value)}
    for kind, number, given in changes:
        payload = copy.deepcopy(given)
        places = _places(root["root"], ("root",))
        path = places[number % len(places)]
        owner = _at(root, path[:-1])
        CHANGES[kind](owner, path[-1], payload)
        if "root" not in root:
            return payload
    return root["root"]


def _places(value: Any, here: Path) -> list[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [
        place for key, inner in list(items)[:64] for place in (_places(inner, (*here, key)) if len(here) < 20 else [])
    ]
    return [here, *below]


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _replace(owner: Any, key: Any, payload: Any) -> None:
    owner[key] = payload


def _delete(owner: Any, key: Any, payload: Any) -> None:
    del owner[key]


def _add(owner: Any, key: Any, payload: Any) -> None:
    """Into a container; a name that a dict takes is made of the payload."""
    inner = owner[key]
    if isinstance(inner, dict):
        inner[_name(payload)] = payload
    elif isinstance(inner, list):
        inner.append(payload)
    else:
        owner[key] = payload


def _wrap(owner: Any, key: Any, payload: Any) -> None:
    owner[key] = {_name(payload): owner[key]} if isinstance(payload, str) else [owner[key]]


def _rename(owner: Any, key: Any, payload: Any) -> None:
    if isinstance(owner, dict):
        owner[_name(payload)] = owner.pop(key)


def _swap(owner: Any, key: Any, payload: Any) -> None:
    """With its neighbour."""
    keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
    other = keys[(keys.index(key) + 1) % len(keys)]
    owner[key], owner[other] = owner[other], owner[key]


def _name(payload: Any) -> str:
    return payload if isinstance(payload, str) else repr(payload)[:40]


CHANGES: dict[str, Callable[[Any, Any, Any], None]] = {
    "replace": _replace, "delete": _delete, "add": _add, "wrap": _wrap, "rename": _rename, "swap": _swap,
}  # fmt: skip
