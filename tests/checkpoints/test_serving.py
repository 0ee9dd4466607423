"""What we write, in what serves it: transformers, and readers written here from the rules of vLLM and llama.cpp."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_cli.checkpoints.adapter_format import TokenRows, WeightDecomposed, write_full
from dora_cli.checkpoints.serving import MAX_RANKS, max_lora_rank, obstacles, serving_note

MakeCase = Callable[..., Any]  # tests/checkpoints/conftest.py
CLOSE = {"rtol": 0, "atol": 1e-5}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("unlisted")]


@pytest.mark.covering(1)
@pytest.mark.parametrize("export", ["exact", "uniform"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_transformers_own_loader_gives_the_logits_and_the_head(
    kind: str, export: str, make_case: MakeCase, tmp_path: Path
) -> None:
    case = make_case(kind)
    expected = case.logits(case.dense())
    case.write(tmp_path / "adapter", export=export)
    for parameter in case.model.get_submodule(case.head_module).parameters():
        parameter.data.zero_()  # it comes from the file
    loaded = case.model.load_adapter(str(tmp_path / "adapter"))
    assert not loaded.missing_keys and not loaded.unexpected_keys
    torch.testing.assert_close(case.logits(case.model), expected, **CLOSE)
    # and the class itself, which finds the base by the adapter's name of it
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    torch.testing.assert_close(case.logits(model), expected, **CLOSE)


@dataclass
class Refused(Exception):
    """What a server says instead of loading."""

    why: str


@dataclass
class Vllm:
    """vLLM's way to load a LoRA (``vllm/lora`` of 0.8 to 0.12), for a model whose linear layers end as ``modules``.

    One rank and one scale come from the settings, whatever patterns say; factors are copied into buffers of
    ``max_lora_rank`` rows, the scale multiplied into B.
    """

    modules: set[str]
    max_lora_rank: int = 16

    def deltas(self, folder: Path) -> dict[str, Tensor]:
        config = json.loads((folder / "adapter_config.json").read_text())
        if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
            raise Refused(f"missing required configuration fields {missing}")
        if config.get("modules_to_save"):
            raise Refused("only supports modules_to_save being None")
        if config.get("use_dora"):
            raise Refused("does not yet support DoRA")
        if config.get("bias", "none") != "none":
            raise Refused("adapter bias is not supported")
        rank = config["r"]
        if rank > self.max_lora_rank:
            raise Refused(f"rank {rank} is greater than max_lora_rank {self.max_lora_rank}")
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        pairs: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            parts = key.split(".")
            if parts[:2] != ["base_model", "model"] or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
                raise Refused(f"{key} is unsupported LoRA weight")
            if parts[-3] not in self.modules:
                raise Refused(f"expected target modules in {self.modules} but received {parts[-3]}")
            pairs.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor
        return {name: self._product(pair["lora_A"], pair["lora_B"] * scale) for name, pair in pairs.items()}

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        rows, columns = torch.zeros(self.max_lora_rank, a.shape[1]), torch.zeros(b.shape[0], self.max_lora_rank)
        rows[: a.shape[0]], columns[:, : b.shape[1]] = a, b
        return columns @ rows


def llama_cpp(folder: Path) -> dict[str, Tensor]:
    """llama.cpp's scale: the one alpha of its file over the rank of each tensor."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            found[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = b @ a * alpha / a.shape[0]
    return found


@dataclass
class Causal:
    """A language model, its adapted logits, and how to write the adapter."""

    case: Any
    model: nn.Module

    def write(self, folder: Path, **changes: Any) -> Path:
        plain = {"head": {}, "head_modules": [], "task_type": "CAUSAL_LM", "export": "uniform"}
        return self.case.write(folder, **(plain | changes))

    def logits(self, deltas: dict[str, Tensor]) -> Tensor:
        model = deepcopy(self.model)
        for name, delta in deltas.items():
            model.get_submodule(name).weight.data += delta
        return self.case.logits(model)

    @property
    def expected(self) -> Tensor:
        return self.logits({update.name: update.b @ update.a for update in self.case.updates})

    @property
    def server(self) -> Vllm:
        return Vllm({n.rpartition(".")[2] for n, m in self.model.named_modules() if isinstance(m, nn.Linear)})


@pytest.fixture
def causal(make_case: MakeCase) -> Causal:
    case = make_case("llama")
    return Causal(case, transformers.AutoModelForCausalLM.from_pretrained(case.base))


def test_a_uniform_adapter_is_right_with_one_rank_and_one_scale(causal: Causal, tmp_path: Path) -> None:
    folder = causal.write(tmp_path / "adapter")
    assert obstacles(folder) == []
    for served in (causal.server.deltas(folder), llama_cpp(folder)):
        torch.testing.assert_close(causal.logits(served), causal.expected, **CLOSE)
    assert serving_note(folder) == ["rank 3 in every module; for vLLM: --enable-lora --max-lora-rank 8"]


def test_exact_ranks_are_what_such_servers_get_wrong(causal: Causal, tmp_path: Path) -> None:
    folder = causal.write(tmp_path / "adapter", export="exact")
    assert (causal.logits(llama_cpp(folder)) - causal.expected).abs().max() > 1e-2
    assert obstacles(folder) == ["rank or scale differ from module to module"]


def decomposed(case: Any) -> list[WeightDecomposed]:
    return [WeightDecomposed(u.name, u.a, u.b, magnitude=torch.ones(len(u.b))) for u in case.updates]


@pytest.mark.parametrize(
    ("changes", "refused", "clause"),
    [
        (lambda c: {"head": c.head, "head_modules": ["score"]}, "modules_to_save", "score was trained in full"),
        (lambda c: {"modules": decomposed(c)}, "DoRA", "magnitude and direction"),
        (
            lambda c: {"tokens": [TokenRows("model.embed_tokens", [60, 61], torch.ones(2, 16))]},
            "unsupported LoRA weight",
            "new tokens",
        ),
    ],
)
def test_what_a_server_refuses_is_said_before_it_does(
    changes: Any, refused: str, clause: str, causal: Causal, tmp_path: Path
) -> None:
    folder = causal.write(tmp_path / "adapter", **changes(causal.case))
    with pytest.raises(Refused, match=refused):
        causal.server.deltas(folder)
    assert clause in "; ".join(obstacles(folder))
    note = serving_note(folder)
    assert "would refuse" in note[0] and "dora-merge" in note[-1] and max(map(len, note)) <= 80


@pytest.mark.parametrize(
    ("edit", "refused"),
    [
        (lambda config, tensors: config.update(bias="all"), "bias"),
        (lambda config, tensors: config.update(r=600), "greater than max_lora_rank"),
        (lambda config, tensors: tensors.update({"base_model.model.x.bias": torch.ones(2)}), "unsupported"),
    ],
)
def test_nothing_else_gets_past_the_check(edit: Any, refused: str, causal: Causal, tmp_path: Path) -> None:
    folder = causal.write(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(Refused, match=refused):
        causal.server.deltas(folder)
    assert obstacles(folder)


def test_types_of_our_own_are_for_no_server(tmp_path: Path) -> None:
    write_full(tmp_path / "a", {"x": torch.ones(2)}, head_modules=[], base_name=None, task_type=None, method={})
    assert obstacles(tmp_path / "a") == ["its type FULL is this toolkit's own"]


def test_the_smallest_maximum_that_holds_the_rank() -> None:
    assert [max_lora_rank(rank) for rank in (1, 8, 9, 257, 512)] == [8, 8, 16, 320, 512]
    assert all(max_lora_rank(rank) == rank for rank in MAX_RANKS)
