"""Several adapters of one base as one, for a merge: which of them may be combined, and what each weight is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dora_cli.checkpoints.adapter_file import AdapterFile, Lazy, SquareUpdate, Update, read_update
from dora_cli.checkpoints.base_folder import Base
from dora_cli.checkpoints.deltas import WAYS, Combination, Deltas
from dora_cli.checkpoints.names import model_names
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean


@dataclass(frozen=True)
class Several:
    """Where the updates of one module lie: of some of the adapters, by their places among all of them."""

    name: str
    updates: tuple[tuple[int, Update | SquareUpdate], ...]
    combination: Combination
    transposed: bool = False

    @property
    def rank(self) -> int:
        """Of the sum, at most."""
        return sum(update.rank for _, update in self.updates)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.updates[0][1].shape


def combination(
    how: str | None, weights: Sequence[float] | None, density: float | None, seed: int | None, n: int
) -> Combination:
    """The combination of ``n`` adapters that is asked for; null for what is not said.

    Raises:
        UserError: nothing says how, or an option is wrong or has no meaning here.
    """
    if how is None:
        raise UserError(
            f"{n} adapters, and nothing says how they become one" if n > 1 else "weights= and density= need combine=",
            hint=f"set combine= to one of {', '.join(WAYS)}",
        )
    if how not in WAYS:
        raise UserError(f"unknown combine '{how}'", hint=did_you_mean(how, WAYS))
    given = tuple(weights) if weights is not None else (1.0,) * n
    if len(given) != n:
        raise UserError(f"weights= names {len(given)} weights for {n} adapters")
    if not all(abs(weight) <= torch.finfo(torch.float32).max for weight in given):
        raise UserError(f"weights={list(given)}: not all are finite numbers of float32")
    if density is not None and how == "linear":
        raise UserError(f"density={density} has no meaning with combine=linear, which keeps every element")
    if seed is not None and not how.startswith("dare"):
        raise UserError(f"seed={seed} has no meaning with combine={how}, which draws nothing")
    if density is None:
        density = 1.0 if how == "linear" else 0.5
    if not 0 < density <= 1:
        raise UserError(f"density={density} is no share of elements", hint="it must be above 0 and at most 1")
    return Combination(how, given, density, 1 if seed is None else seed)


def leading(
    adapters: Sequence[AdapterFile], names: Sequence[str], *, base: str | None, heads_from: str | None
) -> AdapterFile:
    """The adapter that gives head, tokens and task, and whose model the result is.

    Args:
        names: what the user calls each adapter.
        base: name of the base; null takes the one that all of them name.
        heads_from: the name of the one that is meant, needed where several have a head or tokens.

    Raises:
        UserError: adapters that can't be combined, different bases, or heads of which none was chosen.
    """
    for adapter in adapters:
        _require_sums(adapter)
    _require_one_base(adapters, base)
    return _owner(adapters, names, heads_from)


def combined(adapters: Sequence[AdapterFile], owner: AdapterFile, chosen: Combination, base: Base) -> AdapterFile:
    """The adapters as one, whose updates are combined when they are looked up. All else is the ``owner``'s.

    Adapters of a body, and of a body below a head, name its modules with one prefix less or more: the base's tensors
    say which are the same.

    Raises:
        UserError: an adapter does not fit the base, or two do not fit each other.
    """
    to_owner = _names(owner, base)
    parts: dict[str, list[tuple[int, Update | SquareUpdate]]] = {}
    for place, adapter in enumerate(adapters):
        stored = {name: key for key, name in _names(adapter, base).items()}
        for module, update in adapter.modules.parts.items():
            name = to_owner[stored[f"{module}.weight"]].removesuffix(".weight")
            others = parts.setdefault(name, [])
            if others and others[0][1].shape != update.shape:
                raise UserError(
                    f"{adapters[others[0][0]].folder} and {adapter.folder} are of different bases",
                    where=f"'{name}' has the shapes {list(others[0][1].shape)} and {list(update.shape)}",
                )
            others.append((place, update))
    several = {name: Several(name, tuple(updates), chosen) for name, updates in parts.items()}
    modules: Lazy[Any, Any] = Lazy(several, _read)
    return replace(owner, kind="LORA", modules=modules)


def _names(adapter: AdapterFile, base: Base) -> dict[str, str]:
    """The base's tensors: name in its files → name in the adapter's model."""
    wanted = [f"{module}.weight" for module in adapter.modules]
    return model_names(base.entries, wanted, adapter.prefix, str(base.folder))


def _read(several: Several) -> Deltas:
    updates = [(place, replace(update, transposed=several.transposed)) for place, update in several.updates]
    return Deltas(several.name, [(place, read_update(update)) for place, update in updates], several.combination)


def _require_sums(adapter: AdapterFile) -> None:
    """Refuse what is no update that can be added up."""
    if adapter.kind == "FULL":
        raise UserError(f"{adapter.folder} holds whole parameters, not updates", hint="combine low-rank adapters")
    if any(isinstance(u, Update) and u.magnitude for u in adapter.modules.parts.values()):
        raise UserError(
            f"{adapter.folder} is weight-decomposed: it rescales the base's weights, and has no ΔW of its own",
            hint="merge it by itself",
        )


def _require_one_base(adapters: Sequence[AdapterFile], base: str | None) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        named = (first.base_name, first.revision), (other.base_name, other.revision)
        if base is None and named[0] != named[1]:
            raise UserError(
                f"{first.folder} and {other.folder} name different bases",
                where=" and ".join(f"{name}{f' at {revision}' if revision else ''}" for name, revision in named),
                hint="updates of different models do not add up; if these are one, name it with base=",
            )
        if first.quantization != other.quantization:
            packed = [adapter.quantization or "none" for adapter in (first, other)]
            raise UserError(
                f"{first.folder} and {other.folder} were trained on differently packed bases",
                where=f"quantization {packed[0]} and {packed[1]}",
            )


def _owner(adapters: Sequence[AdapterFile], names: Sequence[str], heads_from: str | None) -> AdapterFile:
    """The adapter whose head, tokens and task the merged model gets."""
    having = [i for i, adapter in enumerate(adapters) if adapter.head or adapter.tokens]
    if heads_from is not None:
        if heads_from not in names:
            raise UserError(f"heads_from={heads_from} is none of the adapters", hint=did_you_mean(heads_from, names))
        return adapters[names.index(heads_from)]
    if len(having) > 1:
        kept: Mapping[str, Any] = adapters[having[0]].head or adapters[having[0]].tokens
        raise UserError(
            f"{len(having)} of the adapters have a head or tokens of their own, which are no updates to be added up",
            where=f"'{next(iter(kept))}' in {adapters[having[0]].folder}, among others",
            hint=f"choose the one whose are kept: heads_from={names[having[0]]}",
        )
    return adapters[having[0] if having else 0]
