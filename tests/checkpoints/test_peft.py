"""Both ways: PEFT reads what we write, and we read what PEFT writes, with equal logits."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_cli.checkpoints.adapter_file import read_adapter
from dora_cli.checkpoints.adapter_format import WeightDecomposed, saved_by_peft, write_adapter, write_full
from dora_cli.checkpoints.merge import merge
from dora_cli.errors import UserError

MakeCase = Callable[..., Any]  # tests/checkpoints/conftest.py
KINDS = ["bert", "roberta", "gpt2", "llama"]
CLOSE = {"rtol": 0, "atol": 1e-5}

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT and transformers warn about themselves
    pytest.mark.usefixtures("unlisted"),
]


def peft_logits(case: Any, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns where keys are missing or left over
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        model = peft.PeftModel.from_pretrained(case.model, adapter)
    logits = case.logits(model)
    model.unload()
    return logits


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


# ours in PEFT


@pytest.mark.parametrize("export", ["exact", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_logits_of_our_adapter(kind: str, export: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(kind)
    expected = case.logits(case.dense())
    head = case.head
    case.write(tmp_path / "adapter", export=export, head={name: tensor + 1 for name, tensor in head.items()})
    case.write(tmp_path / "adapter", export=export)  # replaces the first
    for parameter in case.model.get_submodule(case.head_module).parameters():
        parameter.data.zero_()  # it comes from the file
    torch.testing.assert_close(peft_logits(case, tmp_path / "adapter"), expected, **CLOSE)


def test_ranks_are_in_the_patterns_and_rank_0_is_absent(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    config = config_of(case.write(tmp_path / "adapter"))
    ranks = {update.name: update.rank for update in case.updates}
    assert config["r"] == config["lora_alpha"] == max(ranks.values()) == 3
    assert config["target_modules"] == [name for name, rank in ranks.items() if rank]
    patterns = {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items() if rank in (1, 2)}
    assert config["rank_pattern"] == config["alpha_pattern"] == patterns
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "SEQ_CLS"


def test_uniform_has_one_rank_for_all_and_no_patterns(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("llama")
    adapter = case.write(tmp_path / "adapter", export="uniform")
    config = config_of(adapter)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == [update.name for update in case.updates]
    shapes = {t.shape[0] for name, t in load_file(adapter / "adapter_model.safetensors").items() if "lora_A" in name}
    assert shapes == {3}


@pytest.mark.parametrize("export", ["exact", "uniform"])
def test_an_adapter_of_no_component_at_all_still_loads(export: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    for update in case.updates:
        update.a, update.b = update.a[:0], update.b[:, :0]
    expected = case.logits(case.model)
    assert torch.equal(peft_logits(case, case.write(tmp_path / "adapter", export=export)), expected)


def test_weight_decomposed_is_written_as_use_dora(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    dense = case.dense()
    modules = []
    for update in case.updates:
        magnitude = torch.rand(update.b.shape[0]) + 0.5
        modules.append(WeightDecomposed(update.name, update.a, update.b, magnitude=magnitude))
        weight = dense.get_submodule(update.name).weight.data
        weight *= (magnitude / weight.norm(dim=1))[:, None]
    case.write(tmp_path / "adapter", modules=modules)
    expected = case.logits(dense)
    torch.testing.assert_close(peft_logits(case, tmp_path / "adapter"), expected, **CLOSE)
    merge(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(case.logits(case.load_merged(tmp_path / "out")), expected, **CLOSE)


def test_our_files_read_back_as_they_were(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("gpt2")
    case.write(tmp_path / "adapter", state={"scores": torch.arange(3.0)}, revision="v1")
    adapter = read_adapter(tmp_path / "adapter")
    alive = {update.name: update for update in case.updates if update.rank}
    assert adapter.modules.keys() == alive.keys()
    for name, module in adapter.modules.items():
        assert torch.equal(module.a, alive[name].a) and torch.equal(module.b, alive[name].b) and module.transposed
    assert {name: tensor.tolist() for name, tensor in adapter.head.items()} == {
        name: tensor.tolist() for name, tensor in case.head.items()
    }
    assert (adapter.kind, adapter.base_name, adapter.revision) == ("LORA", str(case.base), "v1")
    assert adapter.method["base_model_prefix"] == "transformer"
    assert load_file(tmp_path / "adapter" / "method_state.safetensors")["scores"].tolist() == [0, 1, 2]
    (tmp_path / "run").mkdir()
    (tmp_path / "adapter").rename(tmp_path / "run" / "adapter")
    assert read_adapter(tmp_path / "run").folder == tmp_path / "run" / "adapter"


def test_whole_parameters_read_back_apart_from_the_head(make_case: MakeCase, tmp_path: Path) -> None:
    tensors = {"bert.x.weight": torch.ones(2, 2), "classifier.weight": torch.zeros(3, 2)}
    write_full(tmp_path / "a", tensors, head_modules=["classifier"], base_name=None, task_type=None, method={})
    adapter = read_adapter(tmp_path / "a")
    assert (list(adapter.replaced), list(adapter.head), list(adapter.modules)) == (
        ["bert.x.weight"],
        ["classifier.weight"],
        [],
    )


def test_peft_wants_every_module_that_ends_like_a_saved_one() -> None:
    names = ["", "distilbert", "pre_classifier", "classifier", "classifier.dense", "distilbert.score_it"]
    assert saved_by_peft(names, ["classifier"], None) == ["pre_classifier", "classifier"]
    assert saved_by_peft(names, [], "SEQ_CLS") == ["pre_classifier", "classifier"]
    assert saved_by_peft(names, [], None) == []


# PEFT's here


def randomise(model: Any) -> None:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.mul_("magnitude" in name).add_(torch.randn_like(parameter) * 0.2)
        if name.endswith("bias") and parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) / 10)


LINEARS = {
    "bert": ["query", "value", "dense"],
    "roberta": ["query", "value"],
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "down_proj"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 16},
    "patterns": {
        "rank_pattern": {"0.*": 2, r".*\.1\..*": 5, "value": 3},
        "alpha_pattern": {r"^.*\.1\..*": 7.5, "c_attn": 3},
    },
    "rslora": {"use_rslora": True, "lora_alpha": 10, "rank_pattern": {"value": 2}},
    "weight_decomposed": {"use_dora": True, "lora_alpha": 5},
    "biases": {"bias": "all"},
    "own_biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_lora_merges_to_pefts_logits(kind: str, variant: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(kind)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=LINEARS[kind], **VARIANTS[variant])
    model = peft.get_peft_model(case.model, config)
    randomise(model)
    expected = case.logits(model)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "adapter", tmp_path / "out", base=str(case.base))
    merged = case.load_merged(tmp_path / "out")
    assert type(merged).__name__ == merged.config.architectures[0] == type(case.model).__name__
    assert merged.config.num_labels == 3 and sum(report.ranks.values()) > 0
    torch.testing.assert_close(case.logits(merged), expected, **CLOSE)
    unloaded = model.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, unloaded[name], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_adalora_merges_to_pefts_logits(kind: str, make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case(kind)
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, target_r=1, lora_alpha=9, total_step=4, tfinal=1, target_modules=LINEARS[kind]
    )
    model = peft.get_peft_model(case.model, config)
    randomise(model)
    emptied = next(n for n, p in model.named_parameters() if "lora_E" in n).removesuffix(".default")
    for name, parameter in model.named_parameters():
        parameter.grad = torch.rand_like(parameter) * (0 if emptied in name else 1)
    for step in (1, 2, 3):  # at the last one the pattern is final
        model.base_model.update_and_allocate(step)
    expected = case.logits(model)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "adapter", tmp_path / "out", base=str(case.base))
    assert 0 in report.ranks.values() and max(report.ranks.values()) > 0
    torch.testing.assert_close(case.logits(case.load_merged(tmp_path / "out")), expected, **CLOSE)
    case.model = model.unload()
    assert (expected - case.logits(case.model)).abs().max() > 1e-3


def test_pefts_adalora_before_its_end_has_the_start_rank(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    config = peft.AdaLoraConfig(task_type="SEQ_CLS", init_r=4, total_step=3, target_modules=["query"])
    model = peft.get_peft_model(case.model, config)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(case.base))
    torch.testing.assert_close(case.logits(case.load_merged(tmp_path / "out")), case.logits(model), **CLOSE)


def test_labels_of_the_base_stay_where_their_number_fits(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    config = json.loads((case.base / "config.json").read_text())
    config |= {"id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
    (case.base / "config.json").write_text(json.dumps(config))
    model = peft.get_peft_model(case.model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base=str(case.base))
    assert case.load_merged(tmp_path / "out").config.id2label == {0: "no", 1: "maybe", 2: "yes"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(target_modules=["query"], lora_bias=True), "sets lora_bias"),
        (peft.LoraConfig(target_modules=["query"], init_lora_weights="pissa"), "changed the base's weights"),
        (peft.LoraConfig(target_modules=["word_embeddings"]), "lora_embedding_A.* is a part of LoRA that is not read"),
        (peft.LoHaConfig(target_modules=["query"]), "of type LOHA"),
        (peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "of type IA3"),
    ],
)
def test_what_would_give_a_wrong_model_is_refused(
    config: Any, message: str, make_case: MakeCase, tmp_path: Path
) -> None:
    model = peft.get_peft_model(make_case("bert").model, config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "adapter")


def test_an_option_of_a_future_peft_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    adapter = make_case("bert").write(tmp_path / "adapter")
    config = config_of(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_quora": False}))
    read_adapter(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_quora": True}))
    with pytest.raises(UserError, match="sets use_quora, which is not read here"):
        read_adapter(adapter)


def test_pickled_adapters_are_refused(make_case: MakeCase, tmp_path: Path) -> None:
    adapter = make_case("bert").write(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        read_adapter(adapter)


def test_a_folder_without_an_adapter_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        read_adapter(tmp_path / "nowhere")


# damage


def change(adapter: Path, **keys: Any) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps(config_of(adapter) | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": "8"}, "'r' should be int, found str"),
        ({"r": True}, "'r' should be int, found bool"),
        ({"r": 4}, r"tensors of rank 3 and 3, adapter_config\.json says 4"),
        ({"r": -1}, "r is -1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"rank_pattern": ["x"]}, "'rank_pattern' should be dict, found list"),
        ({"rank_pattern": {"(": 1}}, "'.' is no pattern"),
        ({"rank_pattern": {"x": "1"}}, "'x' should be int"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"use_dora": "yes"}, "'use_dora' should be bool"),
        ({"peft_type": None}, "'peft_type' should be str, found nothing"),
        ({"peft_type": "FULL", "modules_to_save": [1]}, "'modules_to_save' should be a list of strings"),
        ({"peft_type": "ADALORA"}, "is a part of LoRA that is not read"),
        ({"base_model_name_or_path": 5}, "'base_model_name_or_path' should be str"),
    ],
)
def test_a_config_that_contradicts_its_tensors_is_refused(
    keys: dict[str, Any], message: str, make_case: MakeCase, tmp_path: Path
) -> None:
    adapter = make_case("bert").write(tmp_path / "adapter")
    change(adapter, **keys)
    with pytest.raises(UserError, match=message):
        read_adapter(adapter)


def test_a_pattern_matches_the_end_of_a_name_and_the_first_one_counts(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    adapter = case.write(tmp_path / "adapter")
    ranks = config_of(adapter)["rank_pattern"]
    change(adapter, rank_pattern={"bert": 7, "attention": 7, "y": 7} | ranks | {".*": 3, "query": 7, "0": 7})
    found = {name: module.rank for name, module in read_adapter(adapter).modules.items()}
    assert found == {update.name: update.rank for update in case.updates if update.rank}


def rewrite(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


NAME = "base_model.model.bert.encoder.layer.0.attention.self.key"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{NAME}.lora_B.weight"), r"self\.key' has no lora_B"),
        (lambda t: t.update({f"{NAME}.lora_B.weight": torch.ones(16, 2)}), "tensors of rank 1 and 2"),
        (lambda t: t.update({f"{NAME}.lora_B.weight": torch.ones(16, 1, 1)}), "is no linear layer"),
        (lambda t: t.update({f"{NAME}.lora_B.weight": torch.ones(16, 1).int()}), "has the type I32"),
        (lambda t: t.update({"key.lora_A.weight": torch.ones(16, 1)}), "does not begin with"),
        (lambda t: t.update({f"{NAME}.lora_C.weight": torch.ones(16, 1)}), "part of LoRA that is not read"),
    ],
)
def test_tensors_that_do_not_agree_are_refused(edit: Any, message: str, make_case: MakeCase, tmp_path: Path) -> None:
    adapter = make_case("bert").write(tmp_path / "adapter")
    rewrite(adapter, edit)
    with pytest.raises(UserError, match=message):
        read_adapter(adapter)


def test_numbers_that_are_not_finite_are_named_when_read(make_case: MakeCase, tmp_path: Path) -> None:
    adapter = make_case("bert").write(tmp_path / "adapter")
    rewrite(adapter, lambda t: t[f"{NAME}.lora_A.weight"].fill_(float("inf")))
    with pytest.raises(UserError, match=r"key\.lora_A\.weight' holds numbers that are not finite"):
        read_adapter(adapter).modules[NAME.removeprefix("base_model.model.")]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "method.json"])
def test_truncated_flipped_or_emptied_files_never_end_in_a_traceback(
    file: str, make_case: MakeCase, tmp_path: Path
) -> None:
    adapter = make_case("bert").write(tmp_path / "adapter")
    whole = (adapter / file).read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(whole), (120,), generator=generator).tolist()
    refused = 0
    for i, place in enumerate(places):
        damaged = whole[:place] if i % 2 else whole[:place] + bytes([whole[place] ^ (1 << i % 8)]) + whole[place + 1 :]
        (adapter / file).write_bytes(damaged)
        try:
            found = read_adapter(adapter)
            assert all(module.rank for module in found.modules.values()) and all(len(t) for t in found.head.values())
        except UserError as error:
            refused += 1
            assert str(error.message)
    assert refused >= 60 - (file == "method.json")  # every truncation, and what flips show


def test_two_modules_of_one_name_are_the_callers_mistake(make_case: MakeCase, tmp_path: Path) -> None:
    case = make_case("bert")
    options: dict[str, Any] = {"head": {}, "head_modules": [], "base_name": None, "task_type": None, "method": {}}
    with pytest.raises(ValueError, match="one name"):
        write_adapter(tmp_path / "a", modules=[case.updates[1], case.updates[1]], **options)
    with pytest.raises(ValueError, match="at least one module"):
        write_adapter(tmp_path / "a", modules=[], **options)
    assert not (tmp_path / "a").exists()
