"""Tiny models of many architectures, from their config classes, and a tiny word-level tokenizer.

``tests/conftest.py`` hands this file out as the fixture ``tiny_models``.
"""

from pathlib import Path
from typing import Any

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(40))]
ROWS = 60  # of the embeddings
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": ROWS,
    "max_position_embeddings": 40,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
DECODER = {**SHAPE, **TOKENS, "num_key_value_heads": 1}
WIDE_HEADS = {**DECODER, "head_dim": 12}  # of another width than hidden size / heads, as Qwen3 and Gemma have them
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": ROWS, "n_positions": 40}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
BART = {
    **{f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in {"layers": 2, "ffn_dim": 24}.items()},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 3},
    **{"d_model": 16, "vocab_size": ROWS, "max_position_embeddings": 40, "forced_eos_token_id": 3, **TOKENS},
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": ROWS}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SHAPE),
    "roberta": ("RobertaConfig", {**SHAPE, "type_vocab_size": 1, "pad_token_id": 0}),
    "deberta_v1": ("DebertaConfig", {**SHAPE, **DISENTANGLED}),
    "deberta": ("DebertaV2Config", {**SHAPE, **DISENTANGLED, "share_att_key": True}),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": ROWS, "max_position_embeddings": 40},
    ),
    "electra": ("ElectraConfig", {**SHAPE, "embedding_size": 8}),
    "albert": ("AlbertConfig", {**SHAPE, "embedding_size": 8}),
    "modernbert": (
        "ModernBertConfig",
        {**SHAPE, **TOKENS, "cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2},
    ),
    "bart": ("BartConfig", BART),
    "t5": ("T5Config", {**T5, "decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}),
    "t5_gated": (
        "T5Config",
        {
            **{**T5, "decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0},
            **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        },
    ),
    "gpt2": ("GPT2Config", {**GPT2, "bos_token_id": 0, "eos_token_id": 0}),
    "gpt_neox": ("GPTNeoXConfig", {**SHAPE, **TOKENS}),
    "opt": (
        "OPTConfig",
        {
            **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24, "vocab_size": ROWS},
            **{"max_position_embeddings": 40, "word_embed_proj_dim": 16, "pad_token_id": 0},
        },
    ),
    "llama": ("LlamaConfig", {**SHAPE, "pad_token_id": 0}),
    "mistral": ("MistralConfig", {**DECODER, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**WIDE_HEADS, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", WIDE_HEADS),
    "gemma2": ("Gemma2Config", {**WIDE_HEADS, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**WIDE_HEADS, "sliding_window": 8}),
    "phi": ("PhiConfig", {**SHAPE, **TOKENS}),
    "phi3": ("Phi3Config", DECODER),
    "mixtral": ("MixtralConfig", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 12}),
    "qwen3_moe": ("Qwen3MoeConfig", {**WIDE_HEADS, **EXPERTS}),
    "olmoe": ("OlmoeConfig", {**DECODER, "num_experts": 4, "num_experts_per_tok": 2}),
}


def make_config(kind: str, **changes: Any) -> Any:
    import transformers

    name, options = CONFIGS[kind]
    return getattr(transformers, name)(**{**options, **changes})


def make_tokenizer(**special: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "cls_token" in special:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", model_input_names=names, **special)


def make_byte_tokenizer(**special: str) -> Any:
    from transformers import Qwen2Tokenizer

    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "w", "Ġ", *map(str, range(10))]
    return Qwen2Tokenizer(vocab={c: i for i, c in enumerate(letters)}, merges=[], unk_token="[UNK]", **special)


ENCODER_TOKENS = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
DECODER_TOKENS = {"pad_token": "[PAD]", "eos_token": "[SEP]"}


def save_shaken(folder: Path, kind: str, saved_as: str, tokens: dict[str, str], **changes: Any) -> Path:
    """A base whose biases are not 0 and whose norms are not 1, which would hide mistakes, and whose new head is large.

    Args:
        saved_as: the class of transformers that its checkpoint was saved from, e.g. ``AutoModelForMaskedLM``.
        changes: of the configuration.
    """
    import transformers

    torch.manual_seed(0)
    spread = {"init_std" if kind == "bart" else "initializer_range": 0.1}
    model = getattr(transformers, saved_as).from_config(make_config(kind, **spread, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    # Whatever class is written down, a Qwen2 folder is read as its own byte-level tokenizer.
    tokenizer = make_byte_tokenizer(**tokens) if kind == "qwen2" else make_tokenizer(**tokens)
    tokenizer.save_pretrained(folder)
    return folder
