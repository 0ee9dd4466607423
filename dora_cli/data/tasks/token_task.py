"""What tasks share whose loss is over tokens: cross-entropy of those that are to be learned."""

from typing import Any

import torch
from torch import Tensor

from dora_cli.data.tasks import higher_is_better
from dora_cli.data.tasks.base import Loss, TaskChoice
from dora_cli.data.token_rows import IGNORED
from dora_cli.errors import UserError

CHUNK = 256  # tokens whose probabilities are in float32 at a time


class TokenTask:
    """The part of ``Task`` that does not depend on how a model reads.

    Attributes:
        tokenizer: once rows are encoded; for what is written.
    """

    name = "tokens"

    def __init__(self, config: TaskChoice) -> None:
        if config.labels is not None:
            raise UserError(f"data.labels has no meaning for data.task={self.name}", hint="set data.labels=null")
        self.config = config
        self.metric_names = list(config.metrics) or ["perplexity"]
        self.columns: dict[str, str] = {}
        self.tokenizer: Any = None

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.metric_names[0])

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def facts(self) -> dict[str, str]:
        return {}


def token_loss(logits: Tensor, labels: Tensor) -> Loss:
    """The summed cross-entropy of logits (n, s, V) over labels (n, s), and how many of those are not ``IGNORED``.

    ``outputs``: (n, 3) of each row the summed loss, how many tokens, and how many were predicted right.
    """
    losses, right = TokenLoss.apply(logits, labels)  # (n, s) each, 0 where nothing is learned
    learned = labels != IGNORED
    with torch.no_grad():
        outputs = torch.stack([losses.sum(1), learned.sum(1).to(losses), right.sum(1)], dim=1)
    return Loss(losses.sum(), learned.sum(), outputs)


class TokenLoss(torch.autograd.Function):
    """Cross-entropy of every token in float32, a few thousand numbers of the vocabulary's width at a time.

    The gradient is made along the way, in the logits' own type, so that beside the logits nothing of their size is kept
    in float32; with large vocabularies that is most of a step's memory. Nothing depends on how many tokens are learned,
    so the host does not wait.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits (n, s, V) and labels (n, s) → losses (n, s) and whether the best guess is right (n, s), float32."""
        wanted = labels.clamp_min(0)
        learned = labels != IGNORED
        losses, right = (torch.empty(labels.shape, device=logits.device) for _ in range(2))
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        for row in range(len(logits)):
            for start in range(0, logits.shape[1], CHUNK):
                part = (row, slice(start, start + CHUNK))
                log_p = logits[part].float().log_softmax(-1)
                index = wanted[part][:, None]
                losses[part] = torch.where(learned[part], -log_p.gather(-1, index)[:, 0], 0.0)
                right[part] = ((log_p.argmax(-1) == wanted[part]) & learned[part]).float()
                if gradient is not None:
                    slope = log_p.exp_()
                    slope.scatter_add_(-1, index, -torch.ones_like(index, dtype=slope.dtype))
                    gradient[part] = slope.masked_fill_(~learned[part][:, None], 0.0)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        for row in range(len(gradient)):
            for start in range(0, gradient.shape[1], CHUNK):
                part = (row, slice(start, start + CHUNK))
                gradient[part] = gradient[part].float() * upstream[0][part][:, None]  # bfloat16 has no 1/count
        return gradient, None
