"""``dora-recipes`` through its entry point: list, show, copy, diff."""

from pathlib import Path

import pytest
import yaml

from dora_cli.cli.parts import load_parts
from dora_cli.cli.recipes import main
from dora_cli.config.compose import compose
from dora_cli.config.recipes import choices, recipes_dir, sentences


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def test_all_are_listed_with_what_they_say(capsys):
    text = said(capsys)
    found = sentences("recipe", [recipes_dir()])
    assert len(found) > 20 and all(f"{name} " in text for name in found)
    assert " ".join(found["quickstart"].split()) in " ".join(text.split())
    assert "dora " in said(capsys, "list", "method") and "dora " in said(capsys, "list", "methods")
    assert "sigmoid" in said(capsys, "list", "schedule")
    assert all(len(line) <= 80 for group in ("recipe", "data", "importance") for line in said(capsys, "list", group))


def test_what_is_shown_is_the_configuration_and_where_it_stands(capsys):
    text = said(capsys, "show", "quickstart", "seed=7")
    values = yaml.safe_load(text)
    expected = yaml.safe_load(compose(["recipe=quickstart", "seed=7"], load_parts()).yaml)
    del expected["defaults"]
    assert values == expected
    lines = {line.split(":")[0].strip(): line for line in text.splitlines() if ":" in line}
    assert lines["seed"].endswith("# the command line")
    for key, name in (
        ("budget", "recipe/quickstart"),
        ("learning_rate", "tuned/quickstart/dora"),
        ("beta", "method/dora"),
    ):
        file, line = lines[key].rpartition("# ")[2].split(":")
        assert file == f"{name}.yaml"
        assert f"{key}:" in (recipes_dir() / file).read_text().splitlines()[int(line) - 1]
    assert "#" not in lines["holdout"], "the schema's default"


def test_a_recipe_that_leaves_the_data_to_the_user_is_shown_and_parts_of_recipes_are_files(capsys):
    assert "path: null" in said(capsys, "show", "text_classification")
    assert said(capsys, "show", "method/dora") == (recipes_dir() / "method" / "dora.yaml").read_text()


def test_a_copy_composes_and_differs_in_what_was_edited(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = said(capsys, "copy", "quickstart", "to=mine.yaml")
    assert "dora-train recipe=mine.yaml" in text
    parts = load_parts()
    own, shipped = (compose([f"recipe={name}"], parts) for name in ("mine.yaml", "quickstart"))
    assert own.yaml.replace("recipe: mine", "recipe: quickstart").replace("=mine.yaml", "=quickstart") == shipped.yaml
    assert said(capsys, "diff", "mine.yaml") == "mine.yaml comes to the same as quickstart\n"
    file = Path("mine.yaml")
    file.write_text(file.read_text().replace("rank: 10", "rank: 8").replace("budget: 0.2 ", "budget: r1 "))
    assert said(capsys, "diff", "mine.yaml") == ("quickstart → mine.yaml\n  adapter.rank: 10 → 8\n  budget: 0.2 → r1\n")
    before = file.read_text()
    assert main(["copy", "quickstart", "to=mine.yaml"]) == 2
    assert file.read_text() == before and "is there already" in capsys.readouterr().err


def test_a_copy_of_data_gets_what_was_tuned_by_the_file_that_is_named(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    printed = said(capsys, "copy", "data/text", f"to={tmp_path}/data/own.yaml")
    assert "What was tuned for data=text does not come along" in printed
    words = ["recipe=text_classification", "data.path=x", "method=dora", "data=own"]
    before = compose(words, load_parts(), [tmp_path])
    file = tmp_path / printed.split("such as MINE/")[1].split(":\n")[0].replace("NAME", "own")
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(line.strip() for line in printed.splitlines()[-2:]))
    after = compose(words, load_parts(), [tmp_path])
    assert [c.config.train.learning_rate for c in (before, after)] == [0.001, 0.002]
    assert (before.tuned, after.tuned["train.learning_rate"]) == ({}, 0.002)
    assert "tuned/glue/cola/NAME.yaml" in said(capsys, "copy", "method/dora", f"to={tmp_path}/dora.yaml")
    assert "tuned" not in said(capsys, "copy", "model/minilm", f"to={tmp_path}/minilm.yaml")


def test_a_runs_configuration_is_compared_with_its_recipe(tmp_path, capsys):
    record = tmp_path / "config.yaml"
    record.write_text(compose(["recipe=quickstart", "train.epochs=5", "method=lora"], load_parts()).yaml)
    lines = said(capsys, "diff", str(record)).splitlines()
    assert lines[0] == f"quickstart → {record}"
    assert "  train.epochs: 2.0 → 5.0" in lines and "  adapter.name: components → lora" in lines


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["shw"], "unknown command 'shw'", "'show'"),
        (["show"], "cannot read 'show'", "show NAME"),
        (["show", "glue_sts2"], "unknown recipe 'glue_sts2'", "'glue_sst2'"),
        (["show", "method/dorra"], "unknown method 'dorra'", "'dora'"),
        (["show", "schedule/linear"], "schedule has no files", "--help schedule"),
        (["list", "methd"], "unknown group 'methd'", "'method'"),
        (["copy", "quickstart"], "cannot read 'copy quickstart'", "to=FILE.yaml"),
        (["copy", "quickstart", "to=mine"], "is no YAML file", "to=mine.yaml"),
        (["copy", "quickstart", "to=/nowhere/mine.yaml"], "cannot write", ""),
        (["diff", "glue_sst2"], "does not say which recipe", "diff glue_sst2 NAME"),
    ],
)
def test_mistakes_are_answered(argv, message, hint, capsys):
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert message in text and hint in text and "Traceback" not in text


def test_every_shipped_file_can_be_copied(tmp_path, capsys):
    for group in ("recipe", "method", "model", "data"):
        for i, (name, file) in enumerate(choices(group, [recipes_dir()]).items()):
            to = tmp_path / f"{group}{i}.yaml"
            assert main(["copy", name if group == "recipe" else f"{group}/{name}", f"to={to}"]) == 0
            assert yaml.safe_load(to.read_text()) == yaml.safe_load(file.read_text())
            first, said = file.read_text().splitlines()[:2], to.read_text().splitlines()
            assert said[0] == first[0] and "#   copied from: " in "".join(said[:3])
