"""A model comes from where its name says, in float32, with its head named; or one message says why not."""

import json
import shutil
import socket
import sys

import pytest
import torch

from dora_cli.config.schema import ModelConfig
from dora_cli.errors import UserError
from dora_cli.models.load import load_model, position_limit
from dora_cli.models.names import resolve_name

CLASSIFIER = "AutoModelForSequenceClassification"


def choice(name, **options):
    return ModelConfig(str(name), **options)


def load(name, auto_class=CLASSIFIER, offline=True, **options):
    return load_model(choice(name), auto_class=auto_class, offline=offline, **{"num_labels": 3, **options})


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("bert", ["classifier"]),
        ("roberta", ["classifier"]),
        ("albert", ["classifier"]),
        ("deberta", ["pooler", "classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("llama", ["score"]),
        ("gpt2", ["score"]),
        ("opt", ["score"]),
    ],
)
def test_the_head_is_the_largest_modules_that_the_checkpoint_lacks(save_base, kind, heads):
    loaded = load(save_base(kind))
    assert loaded.head_modules == heads
    new = [n for n, _ in loaded.model.named_parameters() if n.startswith(tuple(f"{h}." for h in heads))]
    assert loaded.missing == new != []


def test_a_pooler_that_the_checkpoint_lacks_is_trained_in_full(save_base):
    loaded = load(save_base("bert", add_pooling_layer=False))
    assert loaded.head_modules == ["bert.pooler", "classifier"]
    assert "bert.pooler.dense.weight" in loaded.missing


def test_a_head_of_another_number_of_labels_is_new(save_base, tmp_path):
    load(save_base("roberta")).model.save_pretrained(tmp_path / "three")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "base" / file, tmp_path / "three")
    loaded = load(tmp_path / "three", num_labels=5)
    assert loaded.missing == ["classifier.out_proj.weight", "classifier.out_proj.bias"]
    assert loaded.head_modules == ["classifier"]
    assert loaded.model.classifier.out_proj.weight.shape == (5, 16)


def test_a_head_that_the_checkpoint_has_is_kept_and_still_trained(save_base, tmp_path):
    first = load(save_base("bert"))
    first.model.save_pretrained(tmp_path / "tuned")
    first.tokenizer.save_pretrained(tmp_path / "tuned")
    again = load(tmp_path / "tuned")
    assert again.missing == [] and again.head_modules == ["classifier"]
    assert torch.equal(again.model.classifier.weight, first.model.classifier.weight)


def test_a_language_model_head_is_no_task_head(save_base, tmp_path):
    lacking = load(save_base("llama"), auto_class="AutoModelForCausalLM")
    assert lacking.head_modules == ["lm_head"]
    lacking.model.save_pretrained(tmp_path / "whole")
    lacking.tokenizer.save_pretrained(tmp_path / "whole")
    assert load(tmp_path / "whole", auto_class="AutoModelForCausalLM").head_modules == []
    gpt2 = load(save_base("gpt2", folder="gpt2"), auto_class="AutoModelForCausalLM")  # tied to the embedding
    assert gpt2.missing == [] and gpt2.head_modules == []


def test_weights_become_float32_and_labels_reach_the_config(save_base):
    loaded = load(save_base("bert", dtype=torch.bfloat16), id2label={0: "a", 1: "b", 2: "c"})
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert not loaded.model.training


def test_new_parameters_follow_the_global_seed(save_base):
    folder = save_base("bert")
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load(folder).model.classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_tokenizer_without_pad_token_pads_with_its_end_token(save_base):
    loaded = load(save_base("gpt2", tokens={"eos_token": "w7"}))
    assert loaded.tokenizer.pad_token == "w7"
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id == 11


def test_token_types_are_kept_only_for_models_that_know_two(save_base):
    assert "token_type_ids" in load(save_base("bert")).tokenizer.model_input_names
    for kind in ("roberta", "gpt2", "llama"):
        names = load(save_base(kind, folder=kind)).tokenizer.model_input_names
        assert "token_type_ids" not in names and "input_ids" in names


@pytest.mark.parametrize(
    ("kind", "limit"), [("bert", 40), ("gpt2", 40), ("opt", 40), ("llama", None), ("deberta", None)]
)
def test_learned_positions_limit_the_length(save_base, kind, limit):
    loaded = load(save_base(kind))
    assert position_limit(loaded.model) == limit
    length = limit or 60
    words = torch.full((1, length), 5)
    assert loaded.model(input_ids=words).logits.shape == (1, 3)
    if limit:
        with pytest.raises((IndexError, RuntimeError)):
            loaded.model(input_ids=torch.full((1, limit + 1), 5))


def test_roberta_spends_positions_on_its_padding(save_base):
    loaded = load(save_base("roberta"))
    limit = position_limit(loaded.model)
    assert limit == 39
    assert loaded.model(input_ids=torch.full((1, limit), 5)).logits.shape == (1, 3)
    with pytest.raises((IndexError, RuntimeError)):
        loaded.model(input_ids=torch.full((1, limit + 1), 5))


def test_roberta_with_another_padding_is_refused(save_base):
    """Its tokenizer's padding would be counted as words, and a merged model would count otherwise."""
    folder = save_base("roberta")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 1}))
    with pytest.raises(UserError, match="pads with token 0, but the model counts positions by padding of token 1"):
        load(folder)


def test_inputs_longer_than_the_positions_are_refused(save_base):
    folder = save_base("bert")
    load(folder, max_length=40)
    with pytest.raises(UserError, match=r"data\.max_length=41 is more than the 40 positions"):
        load(folder, max_length=41)


def test_loading_says_nothing_and_leaves_transformers_as_it_was(save_base, capfd, monkeypatch):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    folder = save_base("bert")
    capfd.readouterr()
    said = []
    # its own handler writes to the stream that stood for the terminal when it was made
    monkeypatch.setattr(logging.get_logger("transformers"), "callHandlers", said.append)
    load(folder)
    assert said == []
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_offline_never_opens_a_connection(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def connect(*_):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with pytest.raises(UserError, match="no-such/model-anywhere can't be loaded") as caught:
        load("no-such/model-anywhere")
    assert "offline=true" in caught.value.hint
    assert constants.HF_HUB_OFFLINE is False


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_hub_name(name):
    with pytest.raises(UserError, match="no such folder"):
        resolve_name(name)


@pytest.mark.parametrize("name", ["roberta-base", "FacebookAI/roberta-base"])
def test_other_names_are_the_hubs(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve_name(name) == name


def test_an_existing_folder_beats_the_hub(save_base, monkeypatch, tmp_path):
    save_base("bert", folder="mine")
    monkeypatch.chdir(tmp_path)
    assert resolve_name("mine") == str((tmp_path / "mine").resolve())


def test_an_empty_name_is_refused():
    with pytest.raises(UserError, match="empty"):
        resolve_name("")


@pytest.fixture
def package(save_base, tmp_path, monkeypatch):
    """An installed package that fails when it is imported."""
    root = tmp_path / "site" / "tiny_weights_pkg"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copytree(save_base("bert"), root / "model")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_a_package_is_found_without_importing_it(package):
    assert resolve_name("package://tiny_weights_pkg/model") == str(package / "model")
    assert load("package://tiny_weights_pkg/model").head_modules == ["classifier"]
    assert "tiny_weights_pkg" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package://no_such_pkg/model", "no installed package 'no_such_pkg'"),
        ("package://tiny_weights_pkg/modle", "has no folder 'modle'"),
        ("package://tiny_weights_pkg/../..", "has no folder"),
        ("package://tiny_weights_pkg.model/x", "no installed package"),
        ("package://json/decoder", "has no folder"),
        ("package://", "no installed package ''"),
    ],
)
def test_a_wrong_package_is_named(package, name, message):
    with pytest.raises(UserError, match=message):
        resolve_name(name)


# ---- folders that are no models ------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_and_named(save_base):
    folder = save_base("bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no safetensors weights\n") as caught:
        resolve_name(str(folder))
    assert str(folder) in caught.value.where
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled ones \(pytorch_model.bin\)"):
        resolve_name(str(folder))


@pytest.mark.parametrize(
    ("made", "hint"), [("adapter_config.json", "adapter"), ("adapter", "run folder"), ("x", "hub name")]
)
def test_a_folder_without_config_says_what_it_looks_like(tmp_path, made, hint):
    (tmp_path / made).mkdir() if made == "adapter" else (tmp_path / made).write_text("{}")
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        resolve_name(str(tmp_path))
    assert hint in caught.value.hint


def sharded(folder):
    from transformers import AutoModel

    AutoModel.from_pretrained(folder).save_pretrained(folder / "s", max_shard_size="5KB")
    index = folder / "s" / "model.safetensors.index.json"
    return folder / "s", index, json.loads(index.read_text())


def test_a_missing_shard_is_named(save_base):
    folder, _, table = sharded(save_base("bert"))
    assert resolve_name(str(folder)) == str(folder)
    shard = sorted(set(table["weight_map"].values()))[0]
    (folder / shard).unlink()
    with pytest.raises(UserError, match=f"shards are missing, e.g. {shard}"):
        resolve_name(str(folder))


@pytest.mark.parametrize("content", ["not json", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(save_base, content):
    folder, index, _ = sharded(save_base("bert"))
    index.write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        resolve_name(str(folder))


def test_an_index_leads_nowhere_outside_its_folder(save_base):
    folder, index, table = sharded(save_base("bert"))
    name = next(iter(table["weight_map"]))
    table["weight_map"][name] = "../model.safetensors"  # exists
    index.write_text(json.dumps(table))
    with pytest.raises(UserError, match="shards are missing"):
        resolve_name(str(folder))


def test_a_checkpoint_without_a_layer_is_refused(save_base):
    from safetensors.torch import load_file, save_file

    path = save_base("bert") / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="do not fit BertForSequenceClassification") as caught:
        load(path.parent)
    assert "bert.encoder.layer.1.output.dense.weight" in caught.value.where


def test_the_names_of_a_head_that_the_class_does_not_know_and_the_way_out(save_base):
    """transformers' class for questions does not know a language model's names, only those of the bare body."""
    from safetensors.torch import load_file, save_file

    path = save_base("llama") / "model.safetensors"
    assert load(path.parent, "AutoModelForQuestionAnswering", num_labels=2).missing == [
        "qa_outputs.weight",
        "qa_outputs.bias",
    ]
    save_file({f"model.{name}": w for name, w in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="do not fit LlamaForQuestionAnswering") as caught:
        load(path.parent, "AutoModelForQuestionAnswering", num_labels=2)
    assert "save the model without its head" in caught.value.hint


def test_a_config_of_another_size_is_refused(save_base):
    folder = save_base("bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(UserError, match="do not fit"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 5000])
def test_truncated_weights_are_damaged(save_base, keep):
    path = save_base("bert") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged"):
        load(path.parent)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("config.json", '{"model_type": "no-such-type"}'),
        ("config.json", '{"model_type": "bert", "hidden_size": "big"}'),
        ("config.json", '{"model_type": "bert", "hidden_size": 30, "num_attention_heads": 7}'),
        ("config.json", '{"model_type": "bert", "hidden_act": "no-such-function"}'),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0", "model": {}}'),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_one_message(save_base, name, content):
    folder = save_base("bert")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match="can't be loaded") as caught:
        load(folder)
    assert caught.value.where and "must be whole" in caught.value.hint


def test_a_type_without_such_a_head_is_refused(save_base):
    with pytest.raises(UserError, match="no ImageClassification model of type 'bert'"):
        load(save_base("bert"), auto_class="AutoModelForImageClassification")


def test_remote_code_is_not_run_unasked(save_base):
    folder = save_base("bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", CLASSIFIER: "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise RuntimeError('ran')")
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "model.trust_remote_code=true" in caught.value.hint


def test_a_model_without_tokenizer_is_refused(save_base):
    folder = save_base("bert")
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load(folder)


def test_a_tokenizer_beyond_the_embedding_is_refused(save_base):
    folder = save_base("bert")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"more{i}" for i in range(30)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="has 74 tokens, the model's embedding only 60"):
        load(folder)
