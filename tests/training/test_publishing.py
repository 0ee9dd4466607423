"""What a run says of serving it, the model card of a run and of a merge, and the upload to a stand-in for the hub."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

from dora_cli.cli.merge import main as dora_merge
from dora_cli.cli.publish_run import require_hub, upload
from dora_cli.config import record
from dora_cli.reporting.card import Facts, adapter_card

Train = Callable[..., int]  # tests/training/conftest.py


@dataclass
class Hub:
    """Takes what is uploaded, or fails as it is told to. A repository that is there stays as private as it is."""

    fails: Exception | None = None
    there: dict[str, bool] = field(default_factory=dict)  # repository → whether it is private
    made: dict[str, Any] = field(default_factory=dict)
    uploads: list[dict[str, Any]] = field(default_factory=list)

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.fails:
            raise self.fails
        self.made = {"repo_id": repo_id, **options}
        self.there.setdefault(repo_id, bool(options["private"]))
        return SimpleNamespace(repo_id=repo_id, __str__=lambda: repo_id)

    def repo_info(self, repo_id: str) -> Any:
        if repo_id not in self.there:
            raise RepositoryNotFoundError("404", response=MagicMock())
        return SimpleNamespace(private=self.there[repo_id])

    def upload_folder(self, **options: Any) -> None:
        self.uploads.append(options)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return stand_in


SMALL = ("budget=0.5", "adapter.rank=4", "train.max_steps=4", "export=uniform")


def test_a_run_writes_its_card_uploads_and_can_again_later(
    dora_train: Train, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "run" / "adapter"
    assert dora_train(*SMALL, "push_to_hub=mine") == 0
    assert hub.made == {"repo_id": "me/mine", "private": None, "exist_ok": True}
    assert hub.uploads[0]["folder_path"] == adapter and "manifest.json" in hub.uploads[0]["ignore_patterns"]
    told = capsys.readouterr().out
    assert "would refuse this one, or serve it wrong:\n  classifier was trained in full" in told
    assert "uploaded to" in told and "names the base by a folder of this machine" in told
    assert "push_to_hub" not in (tmp_path / "run" / "config.yaml").read_text()  # it speaks of one start

    card = ModelCard.load(adapter / "README.md")
    head = yaml.safe_load(card.data.to_yaml())
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-classification"
    assert "base_model" not in head and "datasets" not in head  # both are folders here
    accuracy = next(m for r in head["model-index"][0]["results"] for m in r["metrics"] if m["type"] == "accuracy")
    assert 0 <= accuracy["value"] <= 1
    assert "| components | 48 | 24 |" in card.text and "num_labels=2" in card.text
    assert 'PeftModel.from_pretrained(model, "me/mine")' in card.text
    assert re.search(r"\| `attention.self.query` \| 2 \| \d \| \d\.\d \| \d \|", card.text)
    assert "dora-train recipe=text_classification model.name=… data.path=…" in card.text and "budget=0.5" in card.text
    assert "push_to_hub" not in card.text and str(tmp_path) not in card.content
    assert str(tmp_path.parent) not in card.content

    # once more, and with a hub that fails: the run is whole, and the message says how to go on
    assert dora_train(*SMALL, "resume=true", "push_to_hub=me/mine") == 0
    assert len(hub.uploads) == 2
    hub.fails = ConnectionError("no route\nto the hub")
    assert dora_train(*SMALL, "resume=true", "push_to_hub=me/mine") == 1
    told = capsys.readouterr().err
    assert "was not uploaded; it is saved\n  no route\n" in told and f"hf upload me/mine {adapter} ." in told
    assert "Traceback" not in told

    hub.fails = None
    (adapter / "README.md").write_text("my own words")  # which is no damage
    out = tmp_path / "merged"
    assert dora_merge([f"checkpoint={tmp_path / 'run'}", f"out={out}", "push_to_hub=me/m", "hub.private=true"]) == 0
    assert hub.made["private"] is True and hub.uploads[-1]["folder_path"] == out
    head = yaml.safe_load(ModelCard.load(out / "README.md").data.to_yaml())
    assert head["library_name"] == "transformers" and head["model-index"][0]["results"]
    assert str(tmp_path) not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        (["push_to_hub=me/mine", "offline=true"], {}, "needs the network, and offline=true"),
        (["push_to_hub=me/mine"], {"is_offline_mode": lambda: True}, "HF_HUB_OFFLINE is set"),
        (["push_to_hub=me/mine"], {"get_token": lambda: None}, "there is no token for the hub"),
        (["push_to_hub=me/mine/x"], {}, "is no name of a repository"),
        (["push_to_hub=me/mine", "-m", "seed=1,2"], {}, "push_to_hub is for one run"),
        (["push_to_hub=open", "hub.private=true"], {}, "me/open is public already"),
        (["push_to_hub=me/shut", "hub.private=false"], {}, "me/shut is private already"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_training(
    words: list[str],
    change: dict[str, Any],
    message: str,
    dora_train: Train,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.there = {"me/open": False, "me/shut": True}
    for name, value in change.items():
        monkeypatch.setattr(huggingface_hub, name, value)
    assert dora_train(*SMALL, *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_token_that_the_hub_does_not_know_is_refused(
    dora_train: Train, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise ValueError("401 Unauthorized")

    monkeypatch.setattr(hub, "whoami", refuse)
    assert dora_train(*SMALL, "push_to_hub=me/mine") == 2
    assert "does not answer to this token\n  401 Unauthorized" in capsys.readouterr().err


def test_a_card_says_how_to_serve_what_can_be_served() -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    run = {"data": {"task": "sft", "name": "org/data", "path": None, "config": "main"}}
    words = ["recipe=/home/me/mine.yaml", "data.path=~/x.csv", "++model.name=org/base", "data.columns={a: b}"]
    words += ["data.splits.test=C:\\me\\x.csv", "data.name=org/data", "run=it's $HOME", "--config-dir=own"]
    metrics = {"metrics": {"validation": {"loss": 1.5, "perplexity": float("nan")}}, "versions": {}}
    card = adapter_card(Facts(adapter, {}, metrics, run, words, 16, "me/mine"))
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/base" and head["base_model_relation"] == "adapter"
    assert head["datasets"] == ["org/data"]
    assert "vllm serve org/base --enable-lora --max-lora-rank 16 --lora-modules mine=me/mine" in card
    assert "dora-train recipe=mine.yaml data.path=… model.name=org/base 'data.columns={a: b}' data.sp" in card
    told = re.search(r"dora-train (.*)", card)
    assert told and shlex.split(told[1])[4:] == [
        "data.splits.test=…", "data.name=org/data", "run=it's $HOME", "--config-dir=…",
    ]  # fmt: skip
    in_folder = Facts({**adapter, "base_model_name_or_path": "/home/me/org/base"}, words=words)
    assert "model.name=… " in adapter_card(in_folder)  # though it reads like a name on the hub
    assert "perplexity" not in card and "/home" not in card
    unserved = adapter_card(Facts(adapter, {}, {}, run))
    assert "vllm" not in unserved and "PeftModel" in unserved
    assert "dora-merge" in adapter_card(Facts({"peft_type": "FULL"}))


def test_the_command_is_kept_without_what_speaks_of_one_start() -> None:
    words = ["recipe=x", "++push_to_hub=me/x", "seed=2", "--config-dir", "/home/me/my own"]
    assert record.words_of(record.write("x", {}, {}, words)) == ["recipe=x", "seed=2", "--config-dir=/home/me/my own"]


def test_an_upload_names_its_repository_and_never_shows_what_is_private(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "README.md"
    card.write_text('load_adapter("NAME_OR_FOLDER")')
    assert require_hub("mine", None) == "me/mine" and require_hub("org/x", True) == "org/x"  # which are not there yet
    hub.there["me/open"] = False  # by somebody else, since it was looked at
    assert upload(tmp_path, "me/open", private=True) == 1
    assert "not uploaded; it is saved\n  hub.private=true, and me/open is public" in capsys.readouterr().err
    assert not hub.uploads and "NAME_OR_FOLDER" in card.read_text()
    assert upload(tmp_path, "me/mine", private=True) == 0 and hub.there["me/mine"] and len(hub.uploads) == 1
    assert card.read_text() == 'load_adapter("me/mine")'


def test_the_cards_code_makes_room_for_new_tokens(dora_train: Train, model_dir: Path, tmp_path: Path) -> None:
    assert dora_train(*SMALL, "model.add_tokens=[<x>,<y>]") == 0
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    text = text.replace("NAME_OR_FOLDER", str(tmp_path / "run" / "adapter")).replace('"BASE"', f'"{model_dir}"')
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    logits = []
    for code in codes:
        names: dict[str, Any] = {}
        exec(code, names)
        ids = torch.tensor([[1, len(names["tokenizer"]) - 1]])  # the second new one
        logits.append(names["model"].eval()(input_ids=ids).logits)
    assert len(logits) == 2
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)
