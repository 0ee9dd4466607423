"""Tiny models of many architectures, from their config classes, and a tiny word-level tokenizer."""

import pytest
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


def make_config(kind):
    import transformers as t

    configs = {
        "bert": lambda: t.BertConfig(**SHAPE),
        "roberta": lambda: t.RobertaConfig(**SHAPE, type_vocab_size=1),
        "albert": lambda: t.AlbertConfig(**SHAPE, embedding_size=8),
        "deberta": lambda: t.DebertaV2Config(
            **SHAPE,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            share_att_key=True,
        ),
        "llama": lambda: t.LlamaConfig(**SHAPE, pad_token_id=0),
        "gpt2": lambda: t.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=ROWS, n_positions=40, bos_token_id=0, eos_token_id=0
        ),
        "distilbert": lambda: t.DistilBertConfig(
            dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=ROWS, max_position_embeddings=40
        ),
        "opt": lambda: t.OPTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=24,
            vocab_size=ROWS,
            max_position_embeddings=40,
            word_embed_proj_dim=16,
            pad_token_id=0,
        ),
    }
    return configs[kind]()


def make_tokenizer(**special):
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


ENCODER_TOKENS = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


@pytest.fixture
def save_base(tmp_path):
    """Write a headless model and a tokenizer into a folder, as a pretrained checkpoint has them."""

    def save(kind, *, folder="base", tokens=None, dtype=torch.float32, **model_options):
        from transformers import AutoModel

        torch.manual_seed(0)
        path = tmp_path / folder
        AutoModel.from_config(make_config(kind), **model_options).to(dtype).save_pretrained(path)
        make_tokenizer(**(ENCODER_TOKENS if tokens is None else tokens)).save_pretrained(path)
        return path

    return save


@pytest.fixture
def configs():
    return make_config
