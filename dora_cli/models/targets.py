"""Which modules get an adapter: by structure, or by what the user names."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from dora_cli.errors import UserError

REGEX_MARK = "re:"
METACHARACTERS = frozenset("*+?()[]{}|^$\\")
KEYWORDS = ("attention", "mlp")
KEY = "adapter.targets"


def find_targets(model: nn.Module, targets: str | Iterable[str] | None, exclude: Collection[str]) -> list[str]:
    """Full names of the target modules, in model order, each once (layers shared between depths appear once).

    Candidates are the linear layers (``nn.Linear``, GPT-2's ``Conv1D``) inside the transformer layers, that is below an
    ``nn.ModuleList``: never embeddings, their projections, a pooler, a head, a weight tied to an embedding, or a gate
    with a single output. Experts that a mixture holds as one tensor are no linear layers.

    Args:
        model: a transformers model.
        targets: ``None`` for all candidates; or one pattern or a list of patterns. A pattern is a full name (which may
            also name a linear layer outside the transformer layers, such as a pooler), a dot-bounded end of names
            (``query``, ``attention.output.dense``), ``attention`` or ``mlp`` (the candidates inside and outside a
            layer's attention), or a regular expression for whole names (marked by ``re:`` or by a metacharacter other
            than the dot).
        exclude: names of modules that are trained in full, e.g. the head; nothing inside them is a target.

    Raises:
        UserError: the model has no candidates; a pattern chooses nothing, or names what can't be a target.
    """
    candidates = _candidates(model, exclude)
    if not candidates and targets is not None:  # no transformer: then any linear layer may be named
        candidates = _candidates(model, exclude, inside=("",))
    if not candidates:
        raise UserError(
            f"{type(model).__name__} has no linear layers inside transformer layers",
            hint=f"name the modules to adapt: {KEY}='[full.name.one,full.name.two]'",
        )
    if targets is None:
        return candidates
    # The key has no type that would have been checked.
    patterns: list[Any] = list(targets) if isinstance(targets, (list, tuple)) else [targets]
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise UserError(f"{KEY}={targets}: it takes a name, a list of names, or a regular expression")
    chosen = {name for pattern in patterns for name in _matches(pattern, model, candidates, exclude)}
    return [name for name, _ in model.named_modules() if name in chosen]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer layers, in model order: what the outermost lists of modules hold."""
    return [block for layers in outermost_lists(model) for block in layers]


def outermost_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of modules that stand in no other list, in model order."""
    found: list[nn.ModuleList] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(inside or ("\0",)):
            found.append(module)
            inside += (f"{name}.",)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that an adapter fits: ``nn.Linear``, or ``Conv1D`` (weight transposed)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def stacked_experts(model: nn.Module) -> list[str]:
    """Names of the parameters that hold all experts of a mixture at once; checkpoints name them one by one."""
    return [name for name, _ in model.named_parameters() if re.search(r"\.experts\.\w+$", name)]


def _candidates(model: nn.Module, exclude: Collection[str], inside: tuple[str, ...] | None = None) -> list[str]:
    """``inside``: how names begin; default below the lists of transformer layers."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    layers = lists if inside is None else inside
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and name.startswith(layers)
        and id(module.weight) not in tied
        and 1 not in _shape(module)  # all of it is one component: the gate of a mixture's shared expert
        and not _excluded(name, exclude)
    ]


def _shape(module: Any) -> tuple[int, int]:
    """Of the weights; those of a packed layer may lie in memory otherwise."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def _matches(pattern: str, model: nn.Module, candidates: list[str], exclude: Collection[str]) -> list[str]:
    if pattern.startswith(REGEX_MARK) or METACHARACTERS & set(pattern):
        found = _by_regex(pattern.removeprefix(REGEX_MARK), candidates)
    elif pattern in KEYWORDS:
        found = [name for name in candidates if _in_attention(name) == (pattern == "attention")]
    else:
        modules = dict(model.named_modules())
        if pattern in modules:
            _require_adaptable(pattern, model, exclude)
            return [pattern]
        found = [name for name in candidates if name.endswith(f".{pattern}")]
    if not found:
        raise UserError(f"{KEY}: '{pattern}' {_why_nothing(pattern, model, exclude)}", hint=_choices(candidates))
    return found


def _by_regex(expression: str, names: list[str]) -> list[str]:
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise UserError(f"{KEY}: '{expression}' is no regular expression: {error}") from error
    return [name for name in names if compiled.fullmatch(name)]


def _require_adaptable(name: str, model: nn.Module, exclude: Collection[str]) -> None:
    module = model.get_submodule(name)
    if _excluded(name, exclude):
        problem = "is part of the head, which is trained in full anyway"
    elif not is_linear(module):
        problem = f"is no linear layer ({type(module).__name__})"
    elif any(isinstance(m, nn.Embedding) and m.weight is module.weight for m in model.modules()):
        problem = "shares its weight with an embedding, and an adapter on one side would break that tie"
    else:
        return
    raise UserError(f"{KEY}: '{name}' {problem}", hint=_choices(_candidates(model, exclude)))


def _why_nothing(pattern: str, model: nn.Module, exclude: Collection[str]) -> str:
    """What a pattern that chose no candidate did meet, if anything."""
    met = [name for name, _ in model.named_modules() if name.endswith(f".{pattern}")]
    experts = stacked_experts(model)
    if experts and (pattern == "mlp" or any(n.endswith(f".{pattern}") for n in experts)):
        return f"means the experts of a mixture, tensors such as '{experts[0]}', and adapters are for linear layers"
    if not met:
        return "matches no linear layer inside the transformer layers"
    if _excluded(met[0], exclude):
        return f"names only '{met[0]}', part of the head, which is trained in full anyway"
    if is_linear(model.get_submodule(met[0])):
        return f"names only '{met[0]}', outside the transformer layers: give its full name if you mean it"
    return f"names only modules that are no linear layers, such as '{met[0]}'"


def _choices(candidates: list[str]) -> str:
    """The distinct names below a layer's number, e.g. ``attention.self.query``, in model order."""
    ends = dict.fromkeys(re.split(r"\.\d+\.", name)[-1] for name in candidates)
    return f"choose from: {', '.join(ends)}; or {' or '.join(KEYWORDS)}; or a full name; or re:EXPRESSION"


def _in_attention(name: str) -> bool:
    """``attention``, ``self_attn``, ``SelfAttention``, ``attentions.0``: every architecture says one of the two."""
    return re.search("attention|attn", name, re.IGNORECASE) is not None


def _excluded(name: str, exclude: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in exclude)
