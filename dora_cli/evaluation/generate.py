"""Texts that a language model writes by itself, and what is to be found in them."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dora_cli.data.tasks.base import TaskChoice
from dora_cli.data.tasks.summarization import start_token
from dora_cli.data.token_rows import IGNORED

SEARCH = ("num_beams", "length_penalty", "no_repeat_ngram_size")  # options of the data that are transformers' own


def last_turn(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What was said before the last learned stretch of a row, and that stretch.

    Args:
        tokens: (s,) without padding.
        labels: (s,) the same where learned, else ``IGNORED``.
    """
    learned = (labels != IGNORED).nonzero()[:, 0].tolist()
    start, end = learned[-1], learned[-1]
    for place in reversed(learned[:-1]):
        if place != start - 1:
            break
        start = place
    return tokens[:start], tokens[start : end + 1]


def turn_ends(tokenizer: Any, turns: list[Tensor]) -> set[int]:
    """The tokens that end these turns: a chat template may end them with another than the tokenizer's end token."""
    return {int(turn[-1]) for turn in turns if int(turn[-1]) in tokenizer.added_tokens_decoder}


def search(config: TaskChoice) -> dict[str, Any]:
    """What the configuration says of how a text is looked for; nothing: greedily."""
    found = {name: value for name in SEARCH if (value := getattr(config, name)) is not None}
    if found.get("num_beams", 1) == 1:  # it compares beams
        found.pop("length_penalty", None)
    return found


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[Tensor],
    max_new_tokens: int,
    ends: Collection[int] = (),
    search: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """What the model writes after each prompt, up to an end token or ``max_new_tokens``; an encoder-decoder reads the
    prompts with its encoder.

    Args:
        model: on any device, in evaluation mode.
        tokenizer: gives the token to pad with, and one to end at.
        prompts: (s_i,) tokens each, at least one.
        max_new_tokens: of each answer, at most; fewer where the model has no positions for more.
        ends: further tokens to end at.
        search: as ``search`` gives it. The model's own settings (a repetition penalty, a number of beams) are not used,
            but for the tokens that the text of an encoder-decoder must begin and end with.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), width), tokenizer.pad_token_id, device=device)
    mask = torch.zeros_like(tokens)
    encodes = bool(model.config.is_encoder_decoder)
    for row, prompt in enumerate(prompts):
        # A decoder's prompts are aligned at their ends, since that is where writing begins.
        place = slice(0, len(prompt)) if encodes else slice(width - len(prompt), width)
        tokens[row, place] = prompt.to(device)
        mask[row, place] = 1
    ends = sorted({*ends, *_ends(model, tokenizer)})
    window = getattr(model.config, "max_position_embeddings", None)
    begun = 1 if encodes else width  # tokens that are there when writing begins: the first, or the prompt
    longest = min(max_new_tokens, window - begun) if isinstance(window, int) else max_new_tokens
    if longest < 1:
        return [[] for _ in prompts]
    own = model.generation_config
    forced: dict[str, Any] = {}
    if encodes:
        forced = {name: getattr(own, name) for name in ("forced_bos_token_id", "forced_eos_token_id")}
        forced["decoder_start_token_id"] = start_token(model)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=longest,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends or None,
        **forced,
        **(search or {}),
    )
    model.generation_config = config  # else what the model ships (a repetition penalty) is mixed in
    try:
        written = model.generate(tokens, attention_mask=mask, generation_config=config)[:, begun:]
    finally:
        model.generation_config = own
    return [_cut(row, ends) for row in written.tolist()]


def answer(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """What counts of a text: what the last match of a pattern holds (its first group), commas aside; without a pattern
    all of it. None where the pattern is not there."""
    if pattern is None:
        return text.strip()
    found = list(pattern.finditer(text))
    counts = found[-1][1 if pattern.groups else 0] if found else None
    return None if counts is None else counts.replace(",", "").strip()


def _ends(model: Any, tokenizer: Any) -> set[int]:
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return {i for i in (tokenizer.eos_token_id, *own) if i is not None}


def _cut(row: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token, without it and the padding behind it."""
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
