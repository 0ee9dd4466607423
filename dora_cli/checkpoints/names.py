"""Between a checkpoint's names and the model's: a prefix more or less (``encoder.…`` and ``bert.encoder.…``)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from dora_cli.errors import UserError

Rule = Callable[[str], str]


def model_names(keys: Iterable[str], wanted: Sequence[str], prefix: str | None, base: str) -> dict[str, str]:
    """The model's parameter name of every key of a checkpoint.

    A checkpoint was saved from the bare body, from a body with some head, or from the very model. So one rule holds
    for all its keys: unchanged, one prefix added, or one taken away; and it brings forth every wanted name.

    Args:
        keys: the names in the checkpoint.
        wanted: parameter names of the adapted model that must be among the results.
        prefix: the model's ``base_model_prefix`` where it is known. Where not, exactly one rule may fit; where it is
            empty, the names are the checkpoint's own.
        base: the base's name, for the message.

    Raises:
        UserError: no rule brings forth all of ``wanted`` (naming the first that the best one lacks), or, with an
            unknown prefix, several rules do.
    """
    keys, wanted = list(keys), list(dict.fromkeys(wanted))
    results = [{key: rule(key) for key in keys} for rule in _rules(keys, wanted, prefix)]
    lacking = [[name for name in wanted if name not in found] for found in (set(r.values()) for r in results)]
    fitting = [result for result, missing in zip(results, lacking, strict=True) if not missing]
    if not fitting:
        missing = min(lacking, key=len)
        raise UserError(
            f"the adapter does not fit the base {base}",
            where=f"'{missing[0]}' matches nothing in it ({len(missing)} of {len(wanted)} tensors match nothing)",
            hint="name the model it was trained on with base=",
        )
    sources = {tuple(key for key, name in result.items() if name in wanted) for result in fitting}
    if prefix is None and len(sources) > 1:
        raise UserError(
            f"the names in {base} fit the adapter in more than one way", hint="name another base with base="
        )
    return fitting[0]


def _rules(keys: Sequence[str], wanted: Sequence[str], prefix: str | None) -> list[Rule]:
    """The rules to try, the likeliest first."""
    if prefix == "":
        return [_same]
    if prefix:
        saved_with_it = any(key.startswith(f"{prefix}.") for key in keys)
        return [_same if saved_with_it else partial(_add, prefix), _same, partial(_strip, prefix)]
    parts = wanted[0].split(".") if wanted else []
    leads = [".".join(parts[:n]) for n in range(1, len(parts) - 1)]
    firsts = sorted({key.partition(".")[0] for key in keys})
    return [_same, *(partial(_add, lead) for lead in leads), *(partial(_strip, first) for first in firsts)]


def _same(key: str) -> str:
    return key


def _add(prefix: str, key: str) -> str:
    return f"{prefix}.{key}"


def _strip(prefix: str, key: str) -> str:
    return key.removeprefix(f"{prefix}.")
