"""What each tensor of a merged model is made of, decided from names and shapes before any of them is read."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from dora_cli.checkpoints.adapter_file import AdapterFile, SquareUpdate, Update
from dora_cli.checkpoints.base_folder import Base
from dora_cli.checkpoints.merged_config import architecture, base_architecture, has_task_head
from dora_cli.checkpoints.names import model_names
from dora_cli.checkpoints.packed_base import PackedBase
from dora_cli.checkpoints.safetensors_io import FLOATS, Entry, same_bytes
from dora_cli.checkpoints.token_rows import TokenUpdate
from dora_cli.checkpoints.weights import Piece
from dora_cli.errors import UserError


def plan_merge(
    adapter: AdapterFile, base: Base, dtype: str | None, packed: PackedBase | None = None
) -> tuple[list[Piece], list[str]]:
    """Every tensor of the merged model, in the base's order and new ones last; and the base's tensors left out.

    Args:
        dtype: the file's name of the type that floating-point tensors get (``BF16``); null keeps each one's.
        packed: how the base's weights are packed and unpacked before anything is added; null: not at all.

    Raises:
        UserError: something of the adapter matches nothing in the base, or has another shape there.
    """
    updates = {f"{name}.weight": update for name, update in adapter.modules.parts.items()}
    whole = {**adapter.replaced.parts, **adapter.head.parts}
    tokens = _token_rows(adapter, base)
    repacked = {f"{name}.weight": packed.trained_with(name) for name in packed.modules} if packed else {}
    names = model_names(
        base.entries, [*updates, *adapter.replaced, *tokens, *repacked], adapter.prefix, str(base.folder)
    )
    sources = {name: base.entries[key] for key, name in names.items()}
    _require_fit(adapter, base, sources)
    left_out = _pretraining_head(adapter, base, sources) - whole.keys()
    rest = {name: entry for name, entry in sources.items() if name not in left_out and name not in whole}
    tokens |= _copied_rows(tokens, rest, base)
    transposed = _transposed(updates, sources)

    pieces = []
    for name, entry in sources.items():
        if name in whole:
            pieces.append(Piece(name, whole[name], _written(whole[name], dtype), checked=True))
        elif (name in updates and updates[name].rank) or name in repacked:
            update = None
            if name in updates and updates[name].rank:
                update = partial(adapter.modules.read, replace(updates[name], transposed=transposed[name]))
            pieces.append(Piece(name, entry, _written(entry, dtype), update, repacked=repacked.get(name)))
        elif name not in left_out:
            pieces.append(Piece(name, entry, _written(entry, dtype), tokens=tokens.get(name)))
    new = {name: entry for name, entry in whole.items() if name not in sources}
    pieces += [Piece(name, entry, _written(entry, dtype), checked=True) for name, entry in new.items()]
    return pieces, sorted(left_out)


def _token_rows(adapter: AdapterFile, base: Base) -> dict[str, TokenUpdate]:
    """Parameter name → its new rows, without those of a tied output: PEFT saves them too, the base does not have it."""
    there = {key.split(".")[-2] for key in base.entries if key.endswith(".weight")}
    tokens = {name: rows for name, rows in adapter.tokens.items() if name.rpartition(".")[2] in there}
    return {f"{name}.weight": rows for name, rows in (tokens or adapter.tokens).items()}


def _copied_rows(tokens: Mapping[str, TokenUpdate], others: Mapping[str, Entry], base: Base) -> dict[str, TokenUpdate]:
    """The rows once more, for the second copy of a tied embedding that some checkpoints hold.

    Raises:
        UserError: the embedding grows, and something else that has a row for every token does not.
    """
    copies: dict[str, TokenUpdate] = {}
    for name, rows in tokens.items():
        size = others[name].shape[0]
        for other, entry in others.items():
            if other in tokens or entry.shape[:1] != (size,):
                continue
            if same_bytes(entry, others[name]):
                copies[other] = rows
            elif max(rows.ids) >= size == base.config.get("vocab_size"):
                raise UserError(
                    f"'{other}' of {base.folder} has a row for each of {size} tokens, as '{name}' has",
                    where=f"{rows.rows.file} adds rows to '{name}' alone",
                    hint="merge this adapter with PEFT itself",
                )
    return copies


def _written(entry: Entry, dtype: str | None) -> str:
    return dtype if dtype and entry.dtype in FLOATS else entry.dtype


def _require_fit(adapter: AdapterFile, base: Base, sources: Mapping[str, Entry]) -> None:
    """Shapes and types of all that is added or replaced agree with the base's; heads may have any shape."""
    for module, update in adapter.modules.parts.items():
        entry = sources[f"{module}.weight"]
        if entry.dtype not in FLOATS:
            raise UserError(f"{entry.file}: '{entry.name}' has the type {entry.dtype}, to which nothing can be added")
        if entry.shape not in (update.shape, update.shape[::-1]):
            raise _misfit(base, entry, update.shape)
    for name, new in adapter.replaced.parts.items():
        if sources[name].shape != new.shape:
            raise _misfit(base, sources[name], new.shape)
    for name, rows in _token_rows(adapter, base).items():
        _require_rows(adapter, base, sources[name], rows)
    touched = [f"{module}.weight" for module in adapter.modules]
    # A tensor that is both embeddings and is replaced whole is still both; stored twice it would be one of them.
    replaced = [name for name in adapter.replaced if len(_alike(base, sources[name])) > 1]
    for name in (*touched, *replaced, *(name for name in adapter.head if name in sources)):
        if _tied(adapter, base, sources[name]):
            raise UserError(
                f"'{name}' is both the input and the output embedding of {base.folder}",
                where="the adapter changes only one of the two, and a merged model could not",
                hint="save the base with tie_word_embeddings=false, or keep the adapter apart from it",
            )


def _require_rows(adapter: AdapterFile, base: Base, entry: Entry, tokens: TokenUpdate) -> None:
    """Rows of the base's width; of those that follow on the base's none is missing; and nothing else changes it."""
    if len(entry.shape) != 2 or entry.shape[1] != tokens.rows.shape[1]:
        raise _misfit(base, entry, tokens.rows.shape)
    new = sorted(i for i in tokens.ids if i >= entry.shape[0])
    if new != list(range(entry.shape[0], entry.shape[0] + len(new))):
        raise UserError(
            f"the adapter does not fit the base {base.folder}",
            where=f"'{entry.name}' has {entry.shape[0]} rows there, and the adapter follows on with {new[:5]}",
            hint="name the model it was trained on with base=",
        )
    if tokens.size > max(entry.shape[0], 1 + max(tokens.ids)):
        raise UserError(
            f"{adapter.folder}: '{tokens.name}' had {tokens.size} rows, of which the last were not trained",
            hint="merge this adapter with PEFT itself",
        )
    if tokens.name in adapter.modules.parts or f"{tokens.name}.weight" in (*adapter.head, *adapter.replaced):
        raise UserError(f"{adapter.folder} changes '{tokens.name}' twice", hint="merge this adapter with PEFT itself")


def _misfit(base: Base, entry: Entry, shape: tuple[int, ...]) -> UserError:
    return UserError(
        f"the adapter does not fit the base {base.folder}",
        where=f"'{entry.name}' has the shape {list(entry.shape)} there, the adapter's has {list(shape)}",
        hint="name the model it was trained on with base=",
    )


def _tied(adapter: AdapterFile, base: Base, entry: Entry) -> bool:
    """Whether a tensor also serves as the output embedding, as far as the files tell."""
    name = architecture(adapter, base) or ""
    bare = name.endswith("Model") and "Head" not in name
    flag = base.config.get("tie_word_embeddings")
    if has_task_head(name) or bare or flag is False or entry.shape[:1] != (base.config.get("vocab_size"),):
        return False
    return flag is True or len(_alike(base, entry)) == 1


def _alike(base: Base, entry: Entry) -> list[Entry]:
    """The base's tensors of this one's shape, itself among them."""
    return [other for other in base.entries.values() if other.shape == entry.shape]


def _pretraining_head(adapter: AdapterFile, base: Base, names: Mapping[str, Entry]) -> set[str]:
    """The tensors outside the body, where the merged model's class has another head than the base's class.

    A body whose prefix is not known for sure keeps everything: a tensor too much is ignored, one too few is not.
    """
    name, prefix = architecture(adapter, base), adapter.prefix
    firsts = {module.partition(".")[0] for module in adapter.modules}
    if prefix is None and len(firsts) == 1 and adapter.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        prefix = min(firsts - {"encoder", "decoder"}, default=None)
    if not has_task_head(name) or name == base_architecture(base) or prefix is None or firsts - {prefix}:
        return set()
    return {name for name in names if not name.startswith(f"{prefix}.")}


def _transposed(updates: Mapping[str, Update | SquareUpdate], sources: Mapping[str, Entry]) -> dict[str, bool]:
    """Whether each target stores its weight as ``(d_in, d_out)``.

    The base's shape tells, except for square ones: those follow the others of their kind (``c_proj`` of attention
    that of the feed-forward layer), then all others, then the adapter's flag, which PEFT overwrites module by module.

    Raises:
        UserError: for a square weight the others disagree.
    """
    told = {
        name: sources[name].shape != update.shape
        for name, update in updates.items()
        if update.shape[0] != update.shape[1]
    }
    result = dict(told)
    for name in updates.keys() - told.keys():
        kind = name.split(".")[-2]
        votes = {told[other] for other in told if other.split(".")[-2] == kind} or set(told.values())
        votes = votes or {updates[name].transposed}
        if len(votes) > 1:
            raise UserError(
                f"cannot tell how '{name}' is stored: it is square, and the adapter's other targets disagree",
                hint="merge this adapter with PEFT itself",
            )
        result[name] = votes.pop()
    return result
