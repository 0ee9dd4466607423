"""What a recipe and overrides become, who beats whom, and ``config.yaml`` as a recipe that repeats a run."""

import os
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING as OMEGACONF_MISSING

from dora_cli.config.recipes import recipes_dir
from dora_cli.config.schema import MISSING


def test_a_recipe_becomes_a_typed_configuration(composed):
    run = composed("recipe=toy")
    assert run.recipe == "toy"
    assert run.method == "dora"
    assert run.config.model.name == "package://tiny/model"
    assert (run.config.data.name, run.config.data.config) == ("glue", "toy")
    assert run.config.data.columns == {"text": "sentence", "label": "label"}
    assert isinstance(run.config.train.learning_rate, float)
    assert run.names == {
        "adapter": "components",
        "importance": "component_norm",
        "schedule": "cubic_late",
        "allocator": "prune",
        "regularizer": "dem",
    }
    assert type(run.parts["adapter"]).__name__ == "Components"
    assert run.dropped == []


def test_the_command_line_beats_the_recipe_which_beats_tuned_which_beats_the_method(composed):
    run = composed("recipe=toy")
    assert run.config.train.epochs == 3  # recipe 3, tuned 7
    assert run.config.train.learning_rate == 8e-4  # tuned, written 8e-4
    assert run.parts["regularizer"].weight == 0.5  # tuned, over the part's 0.3
    assert run.parts["adapter"].alpha == 8.0  # method
    assert composed("recipe=toy", "train.epochs=2").config.train.epochs == 2


def test_tuned_values_belong_to_a_pair_and_do_not_follow_into_another_method(composed):
    run = composed("recipe=toy", "method=lora")
    assert run.method == "lora"
    assert run.config.train.learning_rate == 1e-3
    assert run.names["regularizer"] == "none"


def test_one_part_of_a_method_can_be_changed(composed):
    run = composed("recipe=toy", "importance=sensitivity", "schedule=power", "schedule.power=3")
    assert run.names["importance"] == "sensitivity"
    assert run.names["adapter"] == "components"
    assert run.parts["schedule"].power == 3.0
    assert run.parts["schedule"].start == 0.15


def test_a_shipped_method_composes_with_the_parts_it_names(composed):
    for method in ("dora", "dora_official", "lora", "adalora", "full", "aflora"):
        assert composed("recipe=toy", f"method={method}").method == method


def test_dora_paper_has_scale_one_and_prunes_at_every_step(composed):
    run = composed("recipe=toy", "method=dora_paper")
    assert run.parts["adapter"].alpha is None
    assert run.parts["allocator"].interval == 1
    assert run.parts["regularizer"].normaliser == "paper"


def test_null_takes_the_parts_own_default(composed):
    assert composed("recipe=toy", "adapter.alpha=null").parts["adapter"].alpha is None
    assert composed("recipe=toy", "regularizer.weight=null").parts["regularizer"].weight == 0.3


def test_the_last_of_two_overrides_counts(composed):
    run = composed("recipe=toy", "seed=1", "method=lora", "seed=2", "method=adalora")
    assert (run.config.seed, run.method) == (2, "adalora")


def test_plus_in_front_of_a_known_key_changes_nothing(composed):
    assert composed("recipe=toy", "+seed=4", "++train.epochs=2").config.seed == 4


def test_interpolations_are_resolved(composed):
    run = composed("recipe=toy", "train.eval_batch_size=${train.batch_size}", "out=runs/${seed}")
    assert run.config.train.eval_batch_size == 16
    assert run.config.out == "runs/1"


def test_a_recipe_file_needs_no_folder_and_no_header(composed, library):
    Path("my recipe, v2.yaml").write_text("defaults:\n  - override /model: tiny\n  - override /data: toy\nseed: 5\n")
    run = composed("recipe=my recipe, v2.yaml")
    assert run.recipe == "my recipe, v2"
    assert run.config.seed == 5
    assert run.config.data.name == "toy"


def test_a_recipe_file_may_have_a_byte_order_mark_and_windows_line_ends(composed):
    text = "# @package _global_\n# One.\ndefaults:\n  - override /model: tiny\n  - override /data: toy\nseed: 6\n"
    Path("mine.yml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert composed("recipe=mine.yml").config.seed == 6


def test_a_recipe_may_build_on_another(composed):
    Path("mine.yaml").write_text("# @package _global_\n# Mine.\ndefaults:\n  - toy\n  - _self_\nseed: 9\n")
    run = composed("recipe=mine.yaml")
    assert (run.recipe, run.config.seed, run.config.budget) == ("mine", 9, "r8")


def test_the_users_file_wins_over_the_shipped_one(composed, library):
    (library / "method").mkdir()
    text = (recipes_dir() / "method" / "dora.yaml").read_text().replace("alpha: 8.0", "alpha: 5.0")
    (library / "method" / "dora.yaml").write_text(text)
    assert composed("recipe=toy").parts["adapter"].alpha == 5.0


def test_a_part_may_come_with_options_under_a_name_of_the_users(composed, library):
    (library / "adapter").mkdir()
    (library / "adapter" / "wide.yaml").write_text("name: lora\nrank: 64\n")
    run = composed("recipe=toy", "method=lora", "adapter=wide")
    assert run.names["adapter"] == "lora"
    assert run.parts["adapter"].rank == 64


def test_a_config_yaml_in_the_users_folder_is_not_taken_for_ours(composed, library):
    (library / "config.yaml").write_text("nonsense: 1\n")
    assert composed("recipe=toy").recipe == "toy"


def test_composing_leaves_no_trace(composed):
    before = GlobalHydra.instance().hydra
    composed("recipe=toy")
    assert GlobalHydra.instance().hydra is before
    assert os.listdir() == []


def test_options_from_a_file_that_the_part_does_not_read_are_dropped_and_told(composed):
    run = composed("recipe=toy", "regularizer=none", "schedule=constant")
    assert "regularizer.weight=0.5: regularizer=none does not read it" in run.dropped
    assert "schedule.start=0.15: schedule=constant does not read it" in run.dropped


def test_home_is_expanded_where_a_shell_leaves_it(composed):
    run = composed("recipe=toy", "out=~/runs", "data.path=~/x.csv")
    assert run.config.out == str(Path.home() / "runs")
    assert run.config.data.path == str(Path.home() / "x.csv")


def test_missing_is_omegaconfs_marker():
    assert MISSING == OMEGACONF_MISSING


# ---- config.yaml -----------------------------------------------------------------------------------------------------


def without_command(run):
    return [line for line in run.yaml.splitlines() if not line.startswith("#   command: ")]


def write_record(run, name="run/config.yaml"):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run.yaml, encoding="utf-8")
    return f"recipe={path}"


@pytest.mark.parametrize("method", ["dora", "dora_paper", "full"])
def test_config_yaml_repeats_a_run_exactly(composed, method):
    first = composed("recipe=toy", f"method={method}", "seed=3", "train.warmup=10", "budget=340k")
    again = composed(write_record(first), "out=new")
    assert without_command(again) == without_command(first)
    assert again.parts == first.parts
    assert (again.recipe, again.method, again.dropped) == ("toy", method, [])
    assert again.config.out == "new"


def test_config_yaml_forgets_what_speaks_of_one_start(composed):
    run = composed("recipe=toy", "out=here", "overwrite=true", "dry_run=true")
    assert run.config.overwrite and run.config.dry_run
    again = composed(write_record(run))
    assert (again.config.out, again.config.overwrite, again.config.dry_run) == (None, False, False)


def test_config_yaml_does_not_need_the_files_that_it_was_made_from(composed, library):
    Path("mine.yaml").write_text("defaults:\n  - override /model: tiny\n  - override /data: glue/toy\nseed: 5\n")
    first = composed("recipe=mine.yaml", "method=dora")
    source = write_record(first)
    for gone in ("model/tiny.yaml", "data/glue/toy.yaml", "tuned/glue/toy/dora.yaml"):
        (library / gone).unlink()
    again = composed(source)
    assert without_command(again) == without_command(first)
    assert again.recipe == "mine"


def test_config_yaml_keeps_text_that_looks_like_something_else(composed):
    labels = "data.labels=['1e3','true','a: b','007','null','x #y','3.0','é']"
    first = composed("recipe=toy", labels, "data.path=/tmp/a=b, c.csv", r"adapter.targets=.*\.(query|key)")
    again = composed(write_record(first))
    assert again.config.data.labels == ["1e3", "true", "a: b", "007", "null", "x #y", "3.0", "é"]
    assert again.config.data.path == "/tmp/a=b, c.csv"
    assert again.parts["adapter"].targets == r".*\.(query|key)"


def test_config_yaml_keeps_text_that_looks_like_an_interpolation(composed):
    first = composed("recipe=toy", r"data.path=\${x}/a.csv")
    assert first.config.data.path == "${x}/a.csv"
    assert composed(write_record(first)).config.data.path == "${x}/a.csv"


def test_config_yaml_takes_overrides_of_values(composed):
    again = composed(write_record(composed("recipe=toy")), "train.epochs=1", "adapter.rank=4")
    assert again.config.train.epochs == 1
    assert again.parts["adapter"].rank == 4


@pytest.mark.parametrize("choice", ["method=lora", "data=toy", "schedule=power"])
def test_config_yaml_fixes_its_choices(refusal, composed, choice):
    error = refusal(write_record(composed("recipe=toy")), choice)
    assert "contradicts" in error.message
    assert f"recipe=toy {choice}" in error.hint
    assert "config.yaml, line" in error.where


def test_config_yaml_whose_part_was_edited_is_refused(refusal, composed):
    run = composed("recipe=toy")
    path = Path("config.yaml")
    path.write_text(run.yaml.replace("  name: components", "  name: svd"))
    error = refusal("recipe=config.yaml")
    assert "adapter.name: svd" in error.message and "adapter=components" in error.message
    assert "config.yaml, line" in error.where


def test_config_yaml_is_plain_yaml_with_its_header_first(composed):
    text = composed("recipe=toy").yaml
    assert text.startswith("# @package _global_\n#")
    assert "#   recipe: toy\n" in text
    values = yaml.safe_load(text)
    assert values["train"]["learning_rate"] == 8e-4
    assert not {"out", "resume", "overwrite", "dry_run", "hydra"} & set(values)


def test_config_yaml_says_by_what_command_the_run_was_started():
    from dora_cli.config import record

    text = record.write("toy", {}, {}, ["recipe=toy", "out=my runs/a", "resume=true"])
    assert "#   command: dora-train recipe=toy 'out=my runs/a'\n" in text, "what a shell would take, without resume"


def test_a_record_cannot_write_outside_its_folder(refusal, composed, tmp_path):
    text = composed("recipe=toy").yaml.replace("/model: tiny", "/model: ../../../../evil")
    Path("config.yaml").write_text(text)
    assert "outside" in refusal("recipe=config.yaml").message
