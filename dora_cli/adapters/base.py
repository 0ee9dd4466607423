"""The protocol between adapters and everything else.

Two classes make an adapter: a *part*, the dataclass of its options, and a *layer*, which replaces one target module and
keeps the original inside as ``base_layer``. What is allocated is a *unit*: a component (a rank-1 piece), a factor
tensor or a whole module, as the part declares. The adapter never sees a budget; an allocator never sees a layer type.

Symbols: ``a`` (r, d_in) right factors, ``b`` (d_out, r) left factors, ``c`` (r,) gates, ``r`` rank.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dora_cli.adapters.dropout import Masks
from dora_cli.adapters.fused import LowRankLinear, can_fuse, compute_type
from dora_cli.adapters.siblings import Siblings, outputs
from dora_cli.errors import UserError


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (d_in, d_out), as GPT-2's ``Conv1D`` does."""
    return not isinstance(module, nn.Linear) and type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer or ``Conv1D``.

    Raises:
        UserError: the module is neither.
    """
    if is_transposed(module):
        d_in, d_out = module.weight.shape  # type: ignore[misc]
        return int(d_out), int(d_in)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    raise UserError(f"cannot adapt a module of type {type(module).__name__}: only linear layers and Conv1D")


def is_packed(module: nn.Module) -> bool:
    """Whether ``weight`` is not the weights themselves but what they are packed into; ``dense_weight()`` unpacks it."""
    return hasattr(module, "dense_weight")


def dense_weight(module: nn.Module) -> Tensor:
    """The weights of a linear layer, (d_out, d_in), float32 at least, without graph; of a packed one a new tensor."""
    if is_packed(module):
        return module.dense_weight()  # type: ignore[operator]
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return (weight.T if is_transposed(module) else weight).to(torch.promote_types(weight.dtype, torch.float32))


class AdapterLayer(nn.Module):
    """One adapted module: the frozen base layer plus a trainable update.

    Subclasses declare ``unit_axes`` (parameter → the axis along which its units lie), ``valve`` (the parameter whose
    zero closes a unit exactly), ``no_decay`` (parameters that weight decay must leave alone) and ``learning_rates``
    (parameter → its own peak rate, where it is not the adapter's). ``removable`` says that without units the layer is
    its base layer again; ``nested`` that a unit counts only together with all before it in its module,
    ``is_low_rank`` that ``low_rank()`` can be asked for, ``sums_components`` that ``operands()`` says the whole update,
    ``adds`` that the update is a function of the input alone: of neither the base nor random numbers but the masks.
    """

    unit_axes: ClassVar[Mapping[str, int]] = {}
    valve: ClassVar[str] = ""
    removable: ClassVar[bool] = True
    is_low_rank: ClassVar[bool] = True
    nested: ClassVar[bool] = False
    sums_components: ClassVar[bool] = False
    adds: ClassVar[bool] = True
    no_decay: frozenset[str] = frozenset()
    learning_rates: Mapping[str, float] = {}

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.d_out, self.d_in = linear_shape(base)
        self.transposed = is_transposed(base)
        self.active = True  # False: the update is switched off, the layer is its base
        self.dropout = 0.0
        self.masks: Masks | None = None  # None: torch's own dropout
        self.mask_group = ""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        return self.updated(x, out) if self.active else out

    def updated(self, x: Tensor, out: Tensor) -> Tensor:
        """The adapted output, given the input x (…, d_in) and the base layer's output (…, d_out)."""
        raise NotImplementedError

    def adapter_input(self, x: Tensor) -> Tensor:
        """x in the adapter's own precision (autocast decides where it is on), after dropout."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(next(self.parameters(recurse=False)).dtype)
        if self.masked:
            assert self.masks is not None
            return x * self.masks.window(x, self.mask_group)
        return nn.functional.dropout(x, self.dropout, self.training)

    @property
    def masked(self) -> bool:
        """Whether dropout is on and its masks are windows (see ``dropout.Masks``); a compiler draws its own."""
        active = self.training and self.dropout > 0 and self.masks is not None
        return active and not torch.compiler.is_compiling()

    # Models look at these on the layers they own (T5 reads ``wo.weight.dtype``, others ``in_features``).
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.d_in

    @property
    def out_features(self) -> int:
        return self.d_out

    @property
    def rank(self) -> int:
        """Number of components that exist, living or not."""
        raise NotImplementedError

    def unit_costs(self) -> list[int]:
        """Parameters that each unit costs under the budget, in order."""
        return [self.d_in + self.d_out] * self.rank

    def unit_tensors(self) -> list[nn.Parameter]:
        """The tensors that are units, in order, where units are whole tensors."""
        return []

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The update's own parameters by name, without the base layer's."""
        return dict(self.named_parameters(recurse=False))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The update as a plain LoRA pair: (r, d_in) and (d_out, r), float32, every scale folded in (METHODS 0.3)."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """ΔW, shape (d_out, d_in), float32, all scales included."""
        a, b = self.low_rank()
        return b @ a

    def side_state(self) -> dict[str, Tensor]:
        """What is particular to this module beside its update (bits, ranges), for ``method_state.safetensors``."""
        return {}

    # ---- verbs -------------------------------------------------------------------------------------------------
    def silence(self, units: Tensor) -> None:
        """Zero the contribution of ``units`` (positions along the unit axis); they stay trainable and may return."""
        with torch.no_grad():
            getattr(self, self.valve).index_fill_(self.unit_axes[self.valve], units, 0.0)

    def mute_gradient(self, units: Tensor) -> None:
        """Zero all gradients of dead ``units``: they must not reopen, and weigh nothing in clipping."""
        for name, axis in self.unit_axes.items():
            grad = getattr(self, name).grad
            if grad is not None:
                grad.index_fill_(axis, units, 0.0)

    def fresh(self, n: int) -> dict[str, Tensor]:
        """Values of ``n`` new units that leave the function as it is, by parameter name."""
        raise NotImplementedError

    def open_units(self) -> Tensor:
        """(r,) bool: which components take part, by the layer's own gates."""
        return torch.ones(self.rank, dtype=torch.bool)

    def settle(self) -> None:
        """The final choice is made: whatever was stochastic about which units take part is so no more."""

    def frozen_units(self) -> list[bool]:
        """Which units are frozen, in order."""
        return [False] * len(self.unit_costs())

    def freeze(self, units: Tensor) -> None:
        """Stop training the tensors at positions ``units``."""
        self._set_trainable(units, False)

    def thaw(self, units: Tensor) -> None:
        """Let them train again."""
        self._set_trainable(units, True)

    def _set_trainable(self, units: Tensor, trainable: bool) -> None:
        tensors = self.unit_tensors()
        for unit in units.tolist():
            tensors[unit].requires_grad_(trainable)
            tensors[unit].grad = None


class WholeModule:
    """A module as one unit: what an allocator of modules sees of a layer in place of its components."""

    def __init__(self, layer: AdapterLayer) -> None:
        self.layer = layer
        # What does not train from the start (square projections of AFLoRA) is never thawed.
        self.trained = [name for name, p in layer.adapter_parameters().items() if p.requires_grad]

    def unit_costs(self) -> list[int]:
        return [sum(self.layer.unit_costs())]

    def frozen_units(self) -> list[bool]:
        return [not any(p.requires_grad for p in self.layer.adapter_parameters().values())]

    def silence(self, units: Tensor) -> None:
        self.layer.active = False

    def restore(self, units: Tensor) -> None:
        self.layer.active = True

    def freeze(self, units: Tensor) -> None:
        self._set_trainable(False)

    def thaw(self, units: Tensor) -> None:
        self._set_trainable(True)

    def _set_trainable(self, trainable: bool) -> None:
        parameters = self.layer.adapter_parameters()
        for name in self.trained:
            parameters[name].requires_grad_(trainable)
            parameters[name].grad = None


class LowRankLayer(AdapterLayer):
    """ΔW = scale · B diag(c) A, with or without the gates c: every parametrisation that is a sum of components.

    A subclass that says how to update by ``operands()`` alone, and not by an ``update`` or ``updated`` of its own, is
    computed together with its base.

    Args:
        base: the linear layer to adapt.
        a, b, c: initial values, shapes (r, d_in), (d_out, r), (r,) or None.
        scale: fixed factor; pruning never changes it.
        dropout: probability of zeroing an entry of the adapter's input in training.
    """

    unit_axes: ClassVar[Mapping[str, int]] = {"a": 0, "b": 1, "c": 0}
    valve = "c"
    no_decay = frozenset({"c"})
    sums_components = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.sums_components = cls.update is LowRankLayer.update and cls.updated is LowRankLayer.updated

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, c: Tensor | None, scale: float, dropout: float) -> None:
        super().__init__(base)
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        if c is not None:
            self.c = nn.Parameter(c)
        self.scale = scale
        self.dropout = dropout
        self.siblings: Siblings | None = None  # None: computed by itself
        # 1 for units that take part, 0 for the others; None (always, but while probing) means all take part.
        self.probe_mask: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def gates(self) -> Tensor:
        """(r,) the factor of each component, without the fixed scale."""
        return self.c if "c" in self.unit_axes else torch.ones_like(self.a[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        if not self.fuses(x):
            return super().forward(x)
        return outputs([self], x)[0] if self.siblings is None else self.siblings.output(self, x)

    def fuses(self, x: Tensor) -> bool:
        """Whether layer and base are computed as a node of the graph for this input."""
        if not self.sums_components or not self.active or self.rank == 0:
            return False
        if self.training and self.dropout > 0 and self.masks is None:
            return False
        return can_fuse(self.base_layer, x, self.a)

    def low_rank_linear(self) -> LowRankLinear:
        """What such a node takes of this layer."""
        weight, bias = self.base_layer.weight, self.base_layer.bias
        return LowRankLinear(weight.T if self.transposed else weight, bias, *self.operands())  # type: ignore[arg-type]

    def dropped(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """And of its input: x after dropout and the mask; None and None where nothing is dropped."""
        if not self.training or self.dropout == 0:
            return None, None
        assert self.masks is not None
        return self.masks.drop(x, self.mask_group, compute_type(x))

    def updated(self, x: Tensor, out: Tensor) -> Tensor:
        if self.rank == 0:
            return out
        return out + self.update(self.adapter_input(x)).to(out.dtype)

    def update(self, x: Tensor) -> Tensor:
        """What is added to the base's output, (…, d_out), for an input that is cast and dropped out already."""
        a, b, factor = self.operands()
        return nn.functional.linear(nn.functional.linear(x, a) * factor, b)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | float]:
        """The factors in training, (r, d_in) and (d_out, r), and what each component is multiplied by."""
        return self.a, self.b, self.factor()

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors as they act on the layer's own spaces, (r, d_in) and (d_out, r), without gates and scale."""
        return self.a, self.b

    def factor(self) -> Tensor | float:
        """What the r-wide hidden activations are multiplied by: scale, gates and the probe's mask, (r,) or a number."""
        factor: Tensor | float = self.scale
        if "c" in self.unit_axes:
            factor = self.c * factor
        return factor if self.probe_mask is None else self.probe_mask * factor

    def low_rank(self) -> tuple[Tensor, Tensor]:
        a, b = (factor.detach().float() for factor in self.factors())
        return a, b * (self.gates().detach().float() * self.scale)

    def start_from_rows(self, a: Tensor) -> None:
        """Take ``a`` (r, d_in) as right factors; what the others start from still leaves the function as it is."""
        with torch.no_grad():
            self.a.copy_(a)

    def load_low_rank(self, a: Tensor, b: Tensor) -> None:
        """Start from a trained pair (r', d_in), (d_out, r'): its components become the first r', the others start anew.

        Raises:
            UserError: the pair has another shape, or more components than this layer.
        """
        filled = (a.norm(dim=1) > 0) & (b.norm(dim=0) > 0)  # padding stays fresh: zeros on both sides would never train
        a, b = a[filled], b[:, filled]
        n = a.shape[0]
        if a.shape[1] != self.d_in or b.shape[0] != self.d_out or n > self.rank:
            raise UserError(
                f"adapter.init_from: a pair of shapes {tuple(a.shape)}, {tuple(b.shape)} does not fit a layer of rank "
                f"{self.rank} with d_in {self.d_in} and d_out {self.d_out}",
                hint="start with more components (adapter.rank; allocator.start_rank where the method grows; the "
                "budget where it stays), or from an adapter of the same model",
            )
        with torch.no_grad():
            # The size goes where this parametrisation keeps it: balanced factors, and the gate (if any) at 1.
            size = (a.norm(dim=1) / b.norm(dim=0)).sqrt()
            self.a[:n] = a / size[:, None]
            self.b[:, :n] = b * size / self.scale
            if "c" in self.unit_axes:
                self.c[:n] = 1.0


def uniform(rows: int, columns: int, bound: float, like: Tensor) -> Tensor:
    """U(−bound, bound), (rows, columns), float32, for the device of ``like``; drawn on the CPU, the same everywhere."""
    return torch.empty(rows, columns).uniform_(-bound, bound).to(like.device)
