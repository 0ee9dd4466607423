"""A few rows of an embedding that train while the others stay: those of new tokens.

Symbols: ``V`` vocabulary, ``k`` trained tokens, ``d`` width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_cli.adapters.inject import locate


class TokenRows(nn.Module):
    """An embedding or an output layer with ``k`` rows of its own in the place of the base's.

    Args:
        base: kept inside, frozen; its weight has shape ``(V, d)``.
        ids: the tokens that train, each once.
        rows: shape ``(k, d)``, shared by both ends of a tied embedding; null starts from the base's own.
    """

    ids: Tensor

    def __init__(self, base: nn.Module, ids: Sequence[int], rows: nn.Parameter | None = None) -> None:
        super().__init__()
        weight: Tensor = base.weight  # type: ignore[assignment]
        self.base_layer = base
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        self.rows = nn.Parameter(weight.detach()[self.ids].float()) if rows is None else rows

    # Models look at these on the layers they own.
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)


class TokenEmbedding(TokenRows):
    """Input embedding: token ids ``(…)`` → ``(…, d)``."""

    place: Tensor

    def __init__(self, base: nn.Module, ids: Sequence[int]) -> None:
        super().__init__(base, ids)
        place = torch.full((self.weight.shape[0],), -1, device=self.weight.device)
        place[self.ids] = torch.arange(len(ids), device=place.device)
        self.register_buffer("place", place, persistent=False)  # (V,) of each token its row, −1 for none

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.base_layer(tokens)
        place = self.place[tokens]
        mine = F.embedding(place.clamp_min(0), self.rows)
        if (scale := getattr(self.base_layer, "embed_scale", None)) is not None:  # Gemma 3's, rounded as it does
            mine = mine * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((place >= 0)[..., None], mine.to(out.dtype), out)


class TokenOutput(TokenRows):
    """Output layer without a bias: hidden states ``(…, d)`` → logits ``(…, V)``."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base_layer(x)
        return logits.index_copy_(-1, self.ids, F.linear(x, self.rows.to(x.dtype)).to(logits.dtype))


def train_rows(model: nn.Module, embedding: str, output: str | None, ids: Sequence[int]) -> dict[str, TokenRows]:
    """Let the rows of ``ids`` train, in place; both ends of a tied embedding have one set of rows.

    Args:
        embedding: full name of the input embedding.
        output: full name of the output layer, or null where the model has none.

    Returns:
        Full name → layer, of those whose rows are to be saved: a tied output is not among them.
    """
    tied = output is not None and model.get_submodule(output).weight is model.get_submodule(embedding).weight
    parent, child = locate(model, embedding)
    first = TokenEmbedding(getattr(parent, child), ids)
    setattr(parent, child, first)
    layers: dict[str, TokenRows] = {embedding: first}
    if output is not None:
        parent, child = locate(model, output)
        last = TokenOutput(getattr(parent, child), ids, first.rows if tied else None)
        setattr(parent, child, last)
        if not tied:
            layers[output] = last
    return layers
