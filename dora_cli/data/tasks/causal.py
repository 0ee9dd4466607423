"""What left-to-right language models share: every token is predicted from those before it."""

import re
from typing import Any

from torch import Tensor

from dora_cli.data.packing import POSITIONS
from dora_cli.data.tasks.base import Loss, TaskChoice
from dora_cli.data.tasks.token_task import TokenTask, token_loss
from dora_cli.data.token_rows import IGNORED
from dora_cli.errors import UserError


class CausalTask(TokenTask):
    """A left-to-right language model (see ``Task``).

    A batch holds ``input_ids``, ``attention_mask`` and ``labels``, shape ``(n, s)`` each; the label of a token is
    itself, or ``IGNORED``, and is predicted from the tokens before it.
    """

    name = "causal"
    kind = "tokens"
    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"

    def __init__(self, config: TaskChoice) -> None:
        super().__init__(config)
        try:
            self.answer_pattern = re.compile(config.answer) if config.answer else None
        except re.error as error:
            raise UserError(f"data.answer={config.answer} is no regular expression: {error}") from error

    def count(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Loss:
        # Positions that begin anew keep packed documents apart, but only where no mask is given (see data.packing).
        seen = POSITIONS if POSITIONS in batch else "attention_mask"
        output = model(input_ids=batch["input_ids"], **{seen: batch[seen]}, use_cache=False)
        return token_loss(output.logits[:, :-1], batch["labels"][:, 1:])
