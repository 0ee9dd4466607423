"""Packed bases: which layers are packed, and that adapters over them compute as over the weights they stand for."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from dora_cli.adapters.base import dense_weight
from dora_cli.adapters.components import Components
from dora_cli.adapters.weight_decomposed import WeightDecomposed
from dora_cli.allocation.importance.displacement import Displacement
from dora_cli.config.schema import ModelConfig
from dora_cli.errors import UserError
from dora_cli.models import quantised
from dora_cli.models.load import LoadedModel, load_model
from dora_cli.models.quantised import KINDS, held_bytes, round_trip, weight_count
from dora_cli.models.targets import find_targets

Load = Callable[..., LoadedModel]

pytestmark = pytest.mark.filterwarnings("ignore")  # what the packages say of their own future


def offered(kind: str) -> Any:
    missing = pytest.mark.skipif(find_spec(KINDS[kind].package) is None, reason=f"{KINDS[kind].package} is missing")
    return pytest.param(kind, marks=missing)


EACH = pytest.mark.parametrize("kind", [offered(kind) for kind in KINDS])


@pytest.fixture
def load(tmp_path: Path, tiny_models: Any) -> Load:
    """Save a tiny model and load it packed."""

    def make(kind: str | None, architecture: str = "bert", task: str = "SequenceClassification", **changes: Any) -> Any:
        folder = tmp_path / architecture
        if not folder.exists():
            tokens = tiny_models.ENCODER_TOKENS if architecture == "bert" else tiny_models.DECODER_TOKENS
            saved_as = "AutoModel" if architecture == "bert" else "AutoModelForCausalLM"
            tiny_models.save_shaken(folder, architecture, saved_as, tokens, **changes)
        return load_model(ModelConfig(str(folder), quantization=kind), auto_class=f"AutoModelFor{task}", offline=True)

    return make


def test_the_key_offers_what_can_be_loaded() -> None:
    hint = ModelConfig.__dataclass_fields__["quantization"]
    assert hint.metadata["choices"] == tuple(KINDS)
    assert type(None) in get_args(get_type_hints(ModelConfig)["quantization"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_named_with_its_extra(kind: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=KINDS[kind].package) as error:
        load(kind)
    assert error.value.hint == f"pip install 'dora-cli[{KINDS[kind].package}]'"


@EACH
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_only_layers_inside_the_transformer_are_packed(kind: str, architecture: str, load: Load) -> None:
    task = "SequenceClassification" if architecture == "bert" else "CausalLM"
    plain, packed = load(None, architecture, task), load(kind, architecture, task)
    assert packed.quantised is not None
    found = [n for n, m in packed.model.named_modules() if hasattr(m, "dense_weight")]
    assert found == list(packed.quantised.modules) == find_targets(plain.model, None, plain.head_modules)
    assert find_targets(packed.model, None, packed.head_modules) == found
    assert packed.missing == plain.missing and packed.head_modules == plain.head_modules
    assert weight_count(packed.model) == sum(p.numel() for p in plain.model.parameters())
    state = plain.model.state_dict()
    for name, tensor in packed.model.state_dict().items():
        if not name.startswith(tuple(f"{n}.weight" for n in found)) and name in state and name not in packed.missing:
            assert torch.equal(tensor, state[name]), name


@EACH
def test_held_bytes_are_those_of_the_table(kind: str, load: Load) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model = load(kind, **wide).model
    weights = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "dense_weight"))
    rest = 4 * (weight_count(model) - weights) + sum(b.nbytes for b in model.buffers())
    # beside what the table says: scales of rows, and one table of code words to a layer
    assert held_bytes(model) == pytest.approx(rest + weights * KINDS[kind].bytes_per_weight, rel=0.02)


@EACH
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packing_a_stored_weight_again_gives_the_same_bits(kind: str, architecture: str, load: Load) -> None:
    if (kind, architecture) == ("ao_int8", "gpt2"):
        with pytest.raises(UserError, match="finds nothing to pack") as error:
            load(kind, architecture, "CausalLM")
        assert "bitsandbytes" in (error.value.hint or "")
        return
    # Rows of 64: with AVX-512, bitsandbytes 0.50.2 unpacks nf4 wrongly where a row is no multiple of its block.
    sizes = {
        "llama": {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
        "gpt2": {"n_embd": 64},
    }[architecture]
    plain, packed = (load(k, architecture, "CausalLM", **sizes) for k in (None, kind))
    assert packed.quantised is not None
    for name, transposed in packed.quantised.modules.items():
        weight = plain.model.get_submodule(name).weight.detach()
        assert transposed == (architecture == "gpt2")
        expected = round_trip(weight.T.contiguous() if transposed else weight, kind)
        found = dense_weight(packed.model.get_submodule(name))
        assert torch.equal(found, expected)
        error = (found - (weight.T if transposed else weight)).norm() / weight.norm()
        assert 1e-4 < error < (0.12 if kind == "bnb_nf4" else 0.012)


@EACH
@pytest.mark.parametrize("part", [Components(dropout=0.2), WeightDecomposed(dropout=0.2)], ids=["components", "wd"])
def test_values_and_gradients_are_those_over_the_dense_weight(kind: str, part: Any, load: Load) -> None:
    base = load(kind).model.bert.encoder.layer[1].output.dense
    base.requires_grad_(False)
    plain = nn.Linear(base.in_features, base.out_features)
    plain.load_state_dict({"weight": dense_weight(base), "bias": base.bias})
    plain.requires_grad_(False)
    results = []
    for module in (base, plain):
        torch.manual_seed(3)
        layer = part.layer(module, 3)
        with torch.no_grad():
            for parameter in layer.adapter_parameters().values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        x = torch.randn(4, 5, base.in_features, requires_grad=True)
        out = layer.train()(x)
        grads = torch.autograd.grad((out * torch.randn_like(out)).sum(), [x, *layer.adapter_parameters().values()])
        results.append((out, layer.delta_weight(), *grads))
    for packed, dense in zip(*results, strict=True):
        torch.testing.assert_close(packed, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [offered("bnb_int8")])
def test_llm_int8_rounds_its_inputs_in_evaluation_alone(kind: str, load: Load) -> None:
    base = load(kind).model.bert.encoder.layer[1].output.dense
    x = torch.randn(64, base.in_features)
    exact = nn.functional.linear(x, dense_weight(base), base.bias)
    torch.testing.assert_close(base.train()(x), exact, rtol=1e-5, atol=1e-5)
    error = (base.eval()(x) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.02


@EACH
def test_displacement_begins_from_the_size_of_the_dense_weight(kind: str, load: Load) -> None:
    from dora_cli.adapters.inject import inject
    from dora_cli.allocation.table import UnitTable

    model = load(kind).model
    names = find_targets(model, "output.dense", [])
    expected = [dense_weight(model.get_submodule(name)).norm() for name in names]
    layers = inject(model, names, Components(), [2] * len(names))
    importance = Displacement()
    importance.attach(UnitTable(layers, "modules"))
    assert importance.base_norms == expected
