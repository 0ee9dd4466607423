"""The toolkit in somebody's own loop: adapters put into a model, and an allocator that is told of every step.

dora = adapt(model, method="dora", budget="r4", total_steps=len(loader) * epochs)
optimizer = torch.optim.AdamW(dora.parameter_groups(lr=1e-3))
for batch in loader:
    model(**batch).loss.backward()
    dora.after_backward()            # before clipping
    optimizer.step()
    dora.after_step(optimizer)       # before gradients are cleared
    optimizer.zero_grad()
dora.save("adapter")
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dora_cli.adapters.base import AdapterLayer, is_transposed
from dora_cli.adapters.inject import inject, regroup, remove
from dora_cli.allocation import rules
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.verdict import Verdict
from dora_cli.api_checks import check_dense, check_given, check_needs, check_optimizer, check_steps
from dora_cli.checkpoints.adapter_format import LowRank
from dora_cli.checkpoints.run_state import load_checkpoint, newest_checkpoint, save_checkpoint
from dora_cli.cli.parts import load_parts
from dora_cli.cli.result_run import low_rank, write_trained
from dora_cli.config.compose import Composed
from dora_cli.config.preset import from_preset
from dora_cli.errors import UserError
from dora_cli.models.load import find_heads
from dora_cli.training.optim import all_groups
from dora_cli.training.sizing import asked_budget, check_values, sized_targets
from dora_cli.training.start import fill
from dora_cli.training.state import join, load_moments, load_values, moments, split
from dora_cli.training.summary import rank_map

FORMAT = 2  # of a state; another one is refused
# The name of a model's class → PEFT's name of its task. That of answers to questions has a wrapper with faults.
PEFT_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def adapt(
    model: nn.Module,
    *,
    method: str = "dora",
    budget: str | float | None = None,
    total_steps: int | None = None,
    heads: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    probe: Callable[[], float] | None = None,
    seed: int = 1,
    export: str = "exact",
    **parts: Any,
) -> "Dora":
    """Freeze ``model``, put adapters into it, and hand back what allocates among them. The model is changed in place.

    Args:
        model: of transformers, or any module; one without transformer layers needs ``adapter.targets``.
        method: a preset of ``dora-train``, with its parts and their options.
        budget: what is left at the end, as for ``dora-train``: ``0.1``, ``"340k"`` or ``"r4"``.
        total_steps: optimizer steps of the whole training; None where it is said later (``Dora.start``).
        heads: full names of modules to train and save in full; None takes what a model of transformers has outside its
            base model, such as ``classifier``, and nothing of any other model.
        options: options of the parts as on the command line: ``{"adapter.rank": 8, "schedule.end": 0.4}``.
        probe: the loss on a fixed batch, for methods that ask for it (``alora``, ``schedule="auto"``); in eval mode and
            without gradients.
        seed: of where the factors start, and of dropout masks. The global random numbers stay as they are.
        export: ``exact`` or ``uniform``, as for ``dora-train``.
        parts: ``adapter``, ``importance``, ``schedule``, ``allocator`` or ``regularizer``: another part than the
            preset's, by name or as an object.

    Raises:
        UserError: names that are not known, parts that do not go together, a budget that can't be met, or a method
            that needs what a loop of one's own does not give.
    """
    if export not in ("exact", "uniform"):
        raise UserError(f"export={export} is not offered", hint="it is exact or uniform")
    check_given(total_steps, heads, seed)
    table = load_parts()
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise UserError("the model has adapters already", hint="merge() or unload() them, or take a fresh model")
    if unknown := parts.keys() - table.keys():
        raise UserError(f"adapt() has no argument '{min(unknown)}'", hint=f"parts are {', '.join(table)}")
    composed = from_preset(method, table, parts, options or {}, budget=budget, seed=seed, export=export)
    units = rules.check(**composed.parts, names=composed.names)
    size = asked_budget(composed)
    check_values(composed, size)
    adapter, allocator = composed.parts["adapter"], composed.parts["allocator"]
    start = getattr(adapter, "start", lambda: None)()
    check_needs(composed, start, probe)
    if heads is None:
        heads = find_heads(model, []) if hasattr(model, "base_model_prefix") else []
    if lost := [name for name in heads if name not in dict(model.named_modules())]:
        raise UserError(f"heads: the model has no module '{lost[0]}'")
    targets, ranks, target = sized_targets(composed, model, list(heads), size)
    check_dense(model, targets)

    model.requires_grad_(False)
    adapter.unfreeze(model, list(heads))
    for name in heads:
        model.get_submodule(name).requires_grad_(True)
    wrapped = {n: r for n, r in zip(targets, ranks, strict=True) if r > 0 or allocator.grows}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # layers draw on the CPU; torch.manual_seed is for every device
        layers = inject(model, list(wrapped), adapter, list(wrapped.values()))
        if start is not None:
            fill(start, layers, adapter, dict(zip(targets, ranks, strict=True)))
    dora = Dora(model, composed, layers, targets, list(heads))
    dora.allocate = lambda total, rebuilds: Allocation(
        layers,
        **{group: composed.parts[group] for group in ("schedule", "importance", "allocator", "regularizer")},
        total_steps=total,
        target=target,
        probe=probe,
        held_out=probe,
        units=units,
        rebuilds=rebuilds,
    )
    if total_steps is not None:
        dora.start(total_steps)
    return dora


class Dora:
    """Adapters in a model, and the allocation among them, made by ``adapt``.

    Attributes:
        model: the adapted model; layers: full name → adapted layer; targets: full names of all target modules;
        head_modules: those that train in full; step: optimizer steps done.
    """

    allocate: Callable[[int, bool], Allocation]

    def __init__(
        self,
        model: nn.Module,
        composed: Composed,
        layers: dict[str, AdapterLayer],
        targets: list[str],
        head_modules: list[str],
    ) -> None:
        self.model, self.composed, self.layers, self.targets = model, composed, layers, targets
        self.head_modules = head_modules
        self.step = 0
        self._passes = 0  # forward passes in training since the last step
        self._fits = False  # whether the optimizer's state has been looked at
        self._allocation: Allocation | None = None
        self._masks = composed.parts["adapter"].masks(layers, composed.config.seed)
        self._hook = model.register_forward_pre_hook(self._before_pass)

    @property
    def allocation(self) -> Allocation:
        """Schedule, importance, allocator and regularizer over the layers.

        Raises:
            UserError: nobody has said how many steps there are.
        """
        if self._allocation is None:
            raise UserError(
                "the schedule needs to know how many optimizer steps there are",
                hint="give adapt() total_steps=…, or call start(total_steps) before the first step",
            )
        return self._allocation

    def start(self, total_steps: int, *, rebuilds: bool = True) -> None:
        """Plan a training of ``total_steps`` optimizer steps.

        Args:
            rebuilds: whether what is dropped leaves its tensors on the way; see ``Allocation``.

        Raises:
            UserError: it is planned already, this is no number of steps, or the schedule does not fit so many.
        """
        check_steps(total_steps)
        if self._allocation is not None:
            raise UserError("this adapter has its schedule already", hint="adapt a fresh model for another training")
        self._allocation = self.allocate(total_steps, rebuilds)
        self._allocation.on_empty(lambda name: remove(self.model, name))

    def parameter_groups(
        self, lr: float, *, head_lr: float | None = None, weight_decay: float = 0.01
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: adapters, and heads with ``head_lr``. Gates, biases and norms do not decay.

        Where units leave their tensors or grow, its state must be scalars and moments of its parameters' shapes, as in
        SGD and the Adam family.

        Raises:
            UserError: a rate with which the method can't work.
        """
        parts, budget = self.composed.parts, asked_budget(self.composed)
        parts["allocator"].check(lr, parts["schedule"], budget)
        return all_groups(self.model, self.layers, self.head_modules, lr=lr, head_lr=head_lr, weight_decay=weight_decay)

    def after_backward(self) -> None:
        """Add the regularizer's gradient. After the last backward pass of a step, before clipping."""
        self.allocation.after_backward(self.step + 1)

    def after_step(self, optimizer: Optimizer, *, taken: bool = True) -> dict[str, Any] | None:
        """Score, and allocate where it is time. After ``optimizer.step()``, before ``optimizer.zero_grad()``.

        Args:
            optimizer: the one that has ``parameter_groups``; parameters may be replaced in it.
            taken: False where the optimizer's step was skipped, as a gradient scaler does.

        Returns:
            At an allocation event: step, budget, alive, params and ranks per module. Else None.

        Raises:
            UserError: after the first step, where the optimizer's state can't follow units that come and go.
        """
        if taken and not self._fits:
            check_optimizer(optimizer, self.allocation)
            self._fits = True
        self.step += 1
        self._passes = 0
        return self.allocation.after_step(self.step, optimizer, Verdict(taken))

    @property
    def final_step(self) -> int:
        """The step of the final choice: from here on the budget is met, and evaluations count."""
        return self.allocation.final_step

    def ranks(self) -> dict[str, int]:
        """Living components of every target module."""
        return rank_map(self)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that training changes, by full name."""
        mine = {f"{m}.{n}" for m, layer in self.layers.items() for n in layer.adapter_parameters()}
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad or n in mine}

    # ---- what is left --------------------------------------------------------------------------------------------
    def save(self, folder: str | os.PathLike[str], *, base_name: str | None = None) -> None:
        """Write the adapter and the heads as they are, in PEFT's layout where ΔW has low rank. Appears whole.

        Args:
            base_name: where the base model comes from; None for what the model says of itself.
        """
        kind = type(self.model).__name__
        write_trained(
            self,
            Path(folder),
            {"recipe": None, "step": self.step, "metrics": {}, "added_tokens": [], "quantization": None},
            task_type=next((task for end, task in PEFT_TASKS.items() if kind.endswith(end)), None),
            base_name=base_name or getattr(self.model, "name_or_path", None) or None,
        )

    def merge(self) -> nn.Module:
        """Add every update to its layer's weight, in float32, rounded once, and take the adapters out."""
        with torch.no_grad():
            for name in self.layers:
                layer, update = self.layers[name], low_rank_or_none(self, name)
                if not layer.active:
                    continue
                delta = layer.delta_weight() if update is None else update.b @ update.a
                weight: torch.Tensor = layer.base_layer.weight  # type: ignore[assignment]
                delta = delta.to(weight.device)
                weight.copy_(weight.float() + (delta.T if is_transposed(layer.base_layer) else delta))
        return self.unload()

    def unload(self) -> nn.Module:
        """Put the base layers back as they were. Nothing of this object can be used afterwards."""
        for name in self.layers:
            remove(self.model, name)
        self._hook.remove()
        return self.model

    # ---- state ---------------------------------------------------------------------------------------------------
    def save_state(self, folder: str | os.PathLike[str], optimizer: Optimizer, *, keep_last: int = 2) -> Path:
        """Write all that resuming needs into ``folder/step-…``, as safetensors and JSON; returns that folder.

        Learning-rate schedule, data order and random numbers are the loop's own.

        Raises:
            UserError: the optimizer's state is more than tensors.
        """
        state = moments(self.model, optimizer)
        if other := next((key for key, value in state.items() if not isinstance(value, torch.Tensor)), None):
            raise UserError(
                f"{type(optimizer).__name__} keeps more than tensors, which save_state can't write",
                where=f"{other} is a {type(state[other]).__name__}",
                hint="take an optimizer of torch.optim, or save the training by other means",
            )
        tensors = {"model": {name: p.detach() for name, p in self.trained_parameters().items()}, "optimizer": state}
        return self.write_state(folder, tensors, keep_last=keep_last)

    def load_state(self, folder: str | os.PathLike[str], optimizer: Optimizer) -> int:
        """Go on from the newest whole state in ``folder``. Returns its step, 0 where there is none.

        Args:
            optimizer: a fresh one over ``parameter_groups``.

        Raises:
            UserError: it is of a training that was adapted otherwise, or of another version's format.
        """
        tensors = self.read_state(folder)
        if tensors is not None:
            load_values(self.model, tensors["model"])
            regroup(self.layers, optimizer)
            load_moments(self.model, optimizer, tensors["optimizer"])
        return self.step

    def write_state(
        self, folder: str | os.PathLike[str], tensors: dict[str, dict[str, torch.Tensor]], *, keep_last: int
    ) -> Path:
        """The allocation's own state into ``folder/step-…``, and ``tensors`` beside it."""
        allocation, numbers = split(self.allocation.state_dict())
        rest = {"format": FORMAT, "training": self._identity(), "step": self.step, "allocation": numbers}
        Path(folder).mkdir(parents=True, exist_ok=True)
        return save_checkpoint(
            Path(folder), self.step, {**tensors, "allocation": allocation}, rest, keep_last=keep_last
        )

    def read_state(self, folder: str | os.PathLike[str]) -> dict[str, dict[str, torch.Tensor]] | None:
        """Take over the allocation's own state; returns the tensors beside it, None where there is no state."""
        path, _ = newest_checkpoint(Path(folder))
        if path is None:
            return None
        tensors, rest = load_checkpoint(path)
        if rest["format"] != FORMAT:
            raise UserError(
                f"{path} has format {rest['format']}, this version reads {FORMAT}",
                hint="go on with the version that wrote it, or begin in another folder",
            )
        then, now = rest["training"], self._identity()
        if differing := [key for key in {**now, **then} if then.get(key) != now.get(key)]:
            key = differing[0]
            raise UserError(
                f"{path} is the state of another training",
                where=f"{key}: {then.get(key, 'not there')} then, {now.get(key, 'not there')} now",
                hint="adapt the model as it was adapted then, or begin in another folder",
            )
        self.allocation.load_state_dict(join(tensors["allocation"], rest["allocation"]))
        self.step = int(rest["step"])
        return tensors

    # ---- inside --------------------------------------------------------------------------------------------------
    def _identity(self) -> dict[str, str]:
        """All that a training that goes on must have in common with the one it goes on from, by key."""
        composed, total = self.composed, self.allocation.window.total
        config = composed.config
        options: dict[str, str] = {}
        for group, part in composed.parts.items():
            if is_dataclass(part):  # an object of the user's own may be none, and have what no text can tell
                values = {f"{group}.{f.name}": getattr(part, f.name) for f in fields(part) if f.init}
                options |= {k: str(v) for k, v in values.items() if isinstance(v, str | int | float | list | None)}
        return {
            "method": composed.method,
            "total_steps": str(total),
            "budget": str(config.budget),
            **composed.names,
            **options,
            "heads": ", ".join(self.head_modules) or "none",
            "seed": str(config.seed),
            "export": config.export,
        }

    def _before_pass(self, module: nn.Module, args: Any) -> None:
        """Every micro-batch in training has masks of its own."""
        if self._masks is not None and module.training:
            self._masks.move(self.step + 1, self._passes)
            self._passes += 1


def low_rank_or_none(dora: Dora, name: str) -> LowRank | None:
    """The living components of a module; None where its update is no plain sum of components."""
    update = low_rank(dora, name) if dora.layers[name].is_low_rank else None
    return update if type(update) is LowRank else None
