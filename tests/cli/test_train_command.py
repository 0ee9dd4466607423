"""``dora-train`` up to the point where training starts, through the real entry and the real parts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dora_cli.cli import train as command
from dora_cli.cli.parts import load_parts
from dora_cli.config.compose import compose
from dora_cli.config.recipes import PART_GROUPS, choices, offered, recipes_dir
from dora_cli.registry import PART_TABLES, part_table

ROOT = Path(__file__).resolve().parents[2]
RECIPES = list(choices("recipe", [recipes_dir()]))
METHODS = list(choices("method", [recipes_dir()]))
PAIRS = list(choices("tuned", [recipes_dir()]))
MODELS, DATA = ([f"{group}={name}" for name in choices(group, [recipes_dir()])] for group in ("model", "data"))


@pytest.fixture(scope="module")
def parts():
    return load_parts()


def dora_train(*argv, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "dora_cli.cli.train", *argv]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=env)


def test_the_eight_glue_recipes_are_there():
    tasks = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"}
    assert {f"glue_{task}" for task in tasks} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(parts, recipe):
    run = compose([f"recipe={recipe}", "data.path=own.csv"], parts)  # some leave the data to the user
    assert run.recipe == recipe
    assert set(run.parts) == set(PART_GROUPS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_composes_and_all_its_options_are_read(parts, method):
    """An option that a method's own file sets and its own part does not read would be dropped in silence."""
    run = compose(["recipe=glue_sst2", f"method={method}"], parts)
    text = (recipes_dir() / "method" / f"{method}.yaml").read_text()
    own = {f"{g}.{o}" for g, options in yaml.safe_load(text).items() if g in PART_GROUPS for o in options}
    dropped = {line.split("=")[0] for line in run.dropped}
    assert not own & dropped


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_every_tuned_pair_composes_and_all_its_options_are_read(parts, pair):
    data, method = pair.rsplit("/", 1)
    run = compose(["recipe=glue_sst2", f"data={data}", f"method={method}", "data.path=own.csv"], parts)
    assert {line.split("=")[0] for line in run.dropped} <= {"adapter.rank"}  # the recipe's, where no rank is read


@pytest.mark.parametrize(("model", "data"), [(MODELS[i % len(MODELS)], data) for i, data in enumerate(DATA)])
def test_every_model_and_data_file_composes(parts, model, data):
    run = compose(["recipe=text_classification", model, data, "data.path=own.csv"], parts)
    assert run.method == "dora"


def test_no_shipped_file_is_left_out_of_these_tests():
    assert len(MODELS) <= len(DATA), "each data file is composed with one model"
    names = [f"recipe={name}" for name in RECIPES] + [f"method={name}" for name in METHODS] + MODELS + DATA
    files = [f"{word.replace('=', '/')}.yaml" for word in names] + [f"tuned/{pair}.yaml" for pair in PAIRS]
    shipped = {str(path.relative_to(recipes_dir())) for path in recipes_dir().rglob("*.yaml")}
    assert {*files, "config.yaml"} == shipped
    assert len(files) + 1 == len(shipped) > 100


def test_a_part_is_offered_by_its_line_in_a_table_alone():
    for group in PART_TABLES:
        assert offered(group, [recipes_dir()]) == sorted(part_table(group))
        assert not (recipes_dir() / group).exists()


def test_a_users_own_file_for_a_part_wins_over_the_stand_in(parts, tmp_path):
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "sigmoid.yaml").write_text("name: sigmoid\nsteepness: 4.0\n")
    run = compose(["recipe=quickstart", "schedule=sigmoid"], parts, [tmp_path])
    assert run.parts["schedule"].steepness == 4.0


def test_yaml_files_are_described_and_names_match():
    for path in recipes_dir().rglob("*.yaml"):
        group = path.relative_to(recipes_dir()).parts[0]
        lines = path.read_text(encoding="utf-8").splitlines()
        if group in ("recipe", "method", "tuned"):
            assert lines[0] == "# @package _global_", path
            assert lines[1].startswith("# "), path
        if group in PART_GROUPS:
            assert yaml.safe_load("\n".join(lines)) == {"name": path.stem}
            assert lines[0].startswith("# "), path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["recipe=glue_sst2", "+typo=1"], "unknown key 'typo'"),
        (["recipe=glue_sst2", "shedule.start=0.2"], "did you mean 'schedule.start'"),
        (["recipe=glue_sst2", "schedule.exponent=2"], "is read by power"),
        (["recipe=typo.yaml"], "typo.yaml, line 3"),
    ],
)
def test_mistakes_exit_with_two_and_leave_no_folder(tmp_path, monkeypatch, capsys, argv, message):
    (tmp_path / "typo.yaml").write_text("# @package _global_\n# A typo.\nsede: 3\n")
    monkeypatch.chdir(tmp_path)
    assert command.main(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and "Traceback" not in said
    assert os.listdir(tmp_path) == ["typo.yaml"]


def test_a_process_exits_with_two(tmp_path):
    done = dora_train("recipe=glue_sst2", "+typo=1", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown key 'typo'")
    assert os.listdir(tmp_path) == []


def test_what_was_composed_is_handed_to_the_run(monkeypatch):
    import dora_cli.cli.train_run as train_run

    seen = []
    monkeypatch.setattr(train_run, "run", lambda composed: seen.append(composed) or 7)
    assert command.main(["recipe=glue_sst2", "budget=0.1", "out=x"]) == 7
    assert (seen[0].recipe, seen[0].config.budget, seen[0].config.out) == ("glue_sst2", 0.1, "x")


def test_m_sweeps(monkeypatch):
    import dora_cli.cli.sweep as sweep

    seen = []
    monkeypatch.setattr(sweep, "sweep", lambda *arguments: seen.append(arguments) or 3)
    assert command.main(["recipe=glue_sst2", "-m", "seed=1,2"]) == 3
    assert seen == [(["recipe=glue_sst2", "seed=1,2"], [])]


def test_cheap_rooms_import_nothing_slow():
    for path in [*ROOT.glob("dora_cli/config/*.py"), *ROOT.glob("dora_cli/cli/*.py")]:
        if path.stem in ("run", "help", "sweep", "train", "parts") or path.parent.name == "config":
            imports = re.findall(r"^(?:from|import) (torch|transformers|datasets)\b", path.read_text(), re.MULTILINE)
            assert not imports, path
