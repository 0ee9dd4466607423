"""Targets are the linear layers of the transformer layers, whatever the architecture calls them."""

import pytest
from torch import nn

from dora_cli.errors import UserError
from dora_cli.models.load import find_heads
from dora_cli.models.targets import find_targets


@pytest.fixture
def build(request):
    """A random classifier of an architecture, and the names of its head."""

    def build(kind):
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_config(request.getfixturevalue("configs")(kind))
        return model, find_heads(model, [])

    return build


# architecture → modules a layer, layers, of those in attention
LAYERS = {
    "bert": (6, 2, 4),
    "roberta": (6, 2, 4),
    "deberta": (6, 2, 4),
    "distilbert": (6, 2, 4),
    "gpt2": (4, 2, 2),
    "llama": (7, 2, 4),
    "albert": (6, 1, 4),  # one set of weights for all layers
    "opt": (6, 1, 4),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_default_targets_are_the_linears_of_the_layers(build, kind):
    model, heads = build(kind)
    per_layer, layers, _ = LAYERS[kind]
    targets = find_targets(model, None, heads)
    assert len(targets) == len(set(targets)) == per_layer * layers
    forbidden = ("embed", "pooler", "classifier", "score", "hidden_mapping", "wte", "wpe")
    assert not [t for t in targets if any(word in t for word in forbidden)]
    everything = [n for n, _ in model.named_modules()]
    assert targets == sorted(targets, key=everything.index)


@pytest.mark.parametrize("kind", LAYERS)
def test_attention_and_mlp_share_the_targets_out(build, kind):
    model, heads = build(kind)
    _, layers, attention = LAYERS[kind]
    first, second = find_targets(model, "attention", heads), find_targets(model, "mlp", heads)
    assert len(first) == attention * layers
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(find_targets(model, None, heads))


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("query", ["attention.self.query"]),
        ("output.dense", ["attention.output.dense", "output.dense"]),
        ("attention.output.dense", ["attention.output.dense"]),
        (["value", "intermediate.dense"], ["attention.self.value", "intermediate.dense"]),
        (["intermediate.dense", "value"], ["attention.self.value", "intermediate.dense"]),
        ("re:.*self.(key|value)", ["attention.self.key", "attention.self.value"]),
        (r".*\.self\.(key|value)", ["attention.self.key", "attention.self.value"]),
        (["mlp", "query"], ["attention.self.query", "intermediate.dense", "output.dense"]),
    ],
)
def test_patterns_choose_in_every_layer_in_model_order(build, pattern, chosen):
    model, heads = build("bert")
    assert find_targets(model, pattern, heads) == [
        f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in chosen
    ]


def test_a_regular_expression_must_match_the_whole_name(build):
    model, heads = build("bert")
    assert find_targets(model, r"bert\.encoder\.layer\.1\..*query", heads) == [
        "bert.encoder.layer.1.attention.self.query"
    ]
    with pytest.raises(UserError, match="matches no linear layer"):
        find_targets(model, "re:query", heads)


def test_an_end_of_a_name_is_bounded_by_dots(build):
    model, heads = build("distilbert")
    with pytest.raises(UserError, match="matches no linear layer"):
        find_targets(model, "lin", heads)
    assert len(find_targets(model, "q_lin", heads)) == 2


def test_a_full_name_reaches_what_suffixes_do_not(build):
    model, heads = build("bert")
    assert find_targets(model, ["bert.pooler.dense"], heads) == ["bert.pooler.dense"]
    assert not [t for t in find_targets(model, "dense", heads) if "pooler" in t]
    with pytest.raises(UserError, match="outside the transformer layers: give its full name"):
        find_targets(model, "pooler.dense", heads)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("quary", "'quary' matches no linear layer"),
        ("classifier", "'classifier' is part of the head"),
        ("out_proj", "part of the head"),
        ("LayerNorm", "no linear layers"),
        ("roberta.embeddings.word_embeddings", r"no linear layer \(Embedding\)"),
        ("re:(", "no regular expression"),
        (["query", "quary"], "'quary'"),
        ([], "it takes a name"),
        ([3], "it takes a name"),
        ("", "it takes a name"),
        (0, "adapter.targets=0: it takes a name"),
        ({"query": 1}, "it takes a name"),
    ],
)
def test_a_pattern_that_chooses_nothing_says_what_there_is(build, pattern, message):
    model, heads = build("roberta")
    with pytest.raises(UserError, match=message) as caught:
        find_targets(model, pattern, heads)
    if "matches no" in message:
        assert "attention.self.query" in caught.value.hint and "intermediate.dense" in caught.value.hint


def test_a_weight_tied_to_an_embedding_is_never_a_target(build):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(8, 4)
            self.layers = nn.ModuleList([nn.Linear(4, 8, bias=False), nn.Linear(8, 4)])
            self.layers[0].weight = self.words.weight

    model = Tied()
    assert find_targets(model, None, []) == ["layers.1"]
    with pytest.raises(UserError, match="shares its weight with an embedding"):
        find_targets(model, "layers.0", [])


def test_experts_and_single_gates_are_no_targets_and_say_why(configs):
    from transformers import AutoModelForCausalLM

    moe = AutoModelForCausalLM.from_config(configs("qwen2_moe"))
    targets = find_targets(moe, None, [])
    assert "model.layers.0.mlp.shared_expert.up_proj" in targets
    assert not [t for t in targets if "experts." in t or t.endswith("gate")]
    assert find_targets(moe, "model.layers.0.mlp.shared_expert_gate", [])  # by its full name
    mixtral = AutoModelForCausalLM.from_config(configs("mixtral"))
    for pattern in ("mlp", "gate_up_proj"):
        with pytest.raises(UserError, match=r"means the experts of a mixture, tensors such as 'model\.layers\.0\.mlp"):
            find_targets(mixtral, pattern, [])


def test_a_model_without_layers_says_so():
    with pytest.raises(UserError, match="no linear layers inside transformer layers"):
        find_targets(nn.Sequential(nn.Linear(2, 2)), None, [])
