"""Tokens that the user adds to a model: to its tokenizer, and to its embeddings where these have no room."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dora_cli.errors import UserError

KEY = "model.add_tokens"


@dataclass(frozen=True)
class NewTokens:
    """Tokens whose embeddings train.

    Attributes:
        words: as the user wrote them.
        ids: of the tokenizer, in the same order.
        embedding: full name of the input embedding.
        output: full name of the output layer; null where the model has none.
    """

    words: list[str]
    ids: list[int]
    embedding: str
    output: str | None


def add_tokens(model: Any, tokenizer: Any, words: Sequence[str], name: str) -> NewTokens:
    """Add ``words`` as special tokens, those that are none yet, and resize the embeddings where they are too small.

    A new row starts as transformers draws it, around the mean of all rows, from torch's global generator. A word that
    is a token already keeps its row as the start: such rows are often there untrained.

    Args:
        name: the model's, for messages.

    Raises:
        UserError: a word that is empty or there twice, or a model of which not all embeddings can be resized so.
    """
    if not all(word.strip() for word in words) or len(set(words)) < len(words):
        raise UserError(f"{KEY}={list(words)}: every token is a word, and is there once")
    source, output = model.get_input_embeddings(), model.get_output_embeddings()
    shared = [n for n, m in model.named_modules() if m is not output and getattr(m, "weight", None) is source.weight]
    if getattr(model.config, "is_encoder_decoder", False) or len(shared) > 1:
        raise UserError(
            f"{KEY}: {type(model).__name__} has several input embeddings, whose rows are not trained here",
            hint="leave it out, or add the tokens beforehand and use method=full",
        )
    if output is not None and output.bias is not None:
        raise UserError(
            f"{KEY}: the output of {name} has a bias, which PEFT's format for new tokens has no place for",
            hint="leave it out, or choose another model",
        )
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([word for word in words if word not in known], special_tokens=True)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(list(words))]
    if len(tokenizer) > source.weight.shape[0]:
        # Without numbers there is no mean to start from.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=not source.weight.is_meta)
    names = {id(module): full for full, module in model.named_modules()}
    source, output = model.get_input_embeddings(), model.get_output_embeddings()
    return NewTokens(list(words), ids, names[id(source)], None if output is None else names[id(output)])
