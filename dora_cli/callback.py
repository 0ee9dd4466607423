"""The toolkit in ``transformers.Trainer``: a callback that tells the allocator of every step.

dora = adapt(model, method="dora", budget="r4")
optimizer = torch.optim.AdamW(dora.parameter_groups(lr=1e-3))
trainer = Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None), callbacks=[DoraCallback(dora)])
trainer.train()
dora.save("adapter")
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_cli.adapters.inject import regroup
from dora_cli.api import Dora
from dora_cli.errors import UserError

FOLDER = "dora"  # in each of the Trainer's checkpoints
RESHAPING = {"grow", "freeze", "thaw"}  # verbs that change what is in the optimizer


class _NotYet(float):
    """A ``max_grad_norm`` that keeps its value but says once, to the first who asks, that it is not above 0.

    That is the Trainer, once a step: the callback clips later. A 0 in its place would stay in the user's arguments
    wherever a step is interrupted, and whatever trains with them next would not be clipped.
    """

    _asked = False

    def __gt__(self, other: float) -> bool:
        asked, self._asked = self._asked, True
        return asked and float(self) > other

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)  # a Trainer pickles its arguments


class DoraCallback(TrainerCallback):
    """Allocates while a ``Trainer`` trains, and keeps its state in the Trainer's checkpoints.

    The schedule is planned over ``state.max_steps``. A Trainer clips before it calls anybody, so this callback does the
    clipping itself, by ``max_grad_norm``, after the regularizer's gradient is in; the norm that the Trainer logs is
    without it. While it trains no tensor changes its shape, so that a Trainer finds its checkpoints as it left them;
    what was dropped leaves the tensors at the end.

    Only steps from the final choice on can be the best: before it, more than the budget is alive.

    Args:
        dora: what ``adapt`` made of the Trainer's model, without ``total_steps``.
    """

    def __init__(self, dora: Dora) -> None:
        self.dora = dora
        self._clip_norm: float | None = None
        self.events: list[dict[str, Any]] = []  # of allocation: step, budget, alive, params and ranks per module

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plan, or go on from a checkpoint.

        Raises:
            UserError: an optimizer without ``dora.parameter_groups``, a setting that does not go with allocation, or a
                checkpoint without the allocator's state.
        """
        dora, optimizer = self.dora, _bare(kwargs["optimizer"])
        self._check(args, optimizer)
        dora.start(state.max_steps, rebuilds=False)
        if state.global_step:
            self._resume(args, state.global_step)
        else:
            regroup(dora.layers, optimizer)  # an allocator may have made room
        norm = args.max_grad_norm
        self._clip_norm = None if norm is None else float(norm)  # None is taken for no clipping

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.max_grad_norm = _NotYet(self._clip_norm or 0.0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.max_grad_norm = self._clip_norm  # type: ignore[assignment]
        self.dora.after_backward()
        if self._clip_norm is not None and self._clip_norm > 0:
            clip_grad_norm_(kwargs["model"].parameters(), self._clip_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        event = self.dora.after_step(_bare(kwargs["optimizer"]))
        if event is not None:
            self.events.append(event)
        if self.dora.step == self.dora.final_step:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.dora.write_state(_checkpoint(args, state.global_step), {}, keep_last=1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.dora.allocation.allocator.compacts and self.dora.step >= self.dora.final_step:
            self.dora.allocation.table.compact()  # the optimizer has done its work

    def _check(self, args: TrainingArguments, optimizer: Optimizer) -> None:
        allocator = self.dora.composed.parts["allocator"]
        tensors = [p for layer in self.dora.layers.values() for p in layer.adapter_parameters().values()]
        mine = {id(p) for p in tensors if p.requires_grad and p.numel()}
        if not mine <= {id(p) for g in optimizer.param_groups if "role" in g for p in g["params"]}:
            raise UserError(
                "the Trainer has made an optimizer of its own, in which gates decay and rates are lost",
                hint="give it one: optimizers=(torch.optim.AdamW(dora.parameter_groups(lr=1e-3)), None)",
            )
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError("DoraCallback is for one process on one device", hint="for several use torchrun dora-train")
        if args.fp16:
            raise UserError(
                "fp16 training is not offered: its scaled gradients hide what allocation looks at", hint="set bf16=True"
            )
        if allocator.verbs & RESHAPING and args.save_strategy != "no":
            raise UserError(
                f"method={self.dora.composed.method} changes what is in the optimizer: a Trainer can't resume that",
                hint="set save_strategy='no', or write a loop of your own, with dora.save_state",
            )

    def _resume(self, args: TrainingArguments, step: int) -> None:
        folder = _checkpoint(args, step)
        if self.dora.read_state(folder) is None:
            raise UserError(
                f"{folder} has no whole state of an allocator",
                hint="the checkpoint must lie in output_dir, and have been saved with this callback",
            )


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{step}" / FOLDER


def _bare(optimizer: Any) -> Optimizer:
    """The optimizer itself, of which accelerate makes a wrapped one."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
