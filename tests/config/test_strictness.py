"""What is refused, and whether the message says the key, the place and the way out."""

from pathlib import Path

import pytest


def recipe(text: str, name: str = "mine.yaml") -> str:
    """A recipe file with ``text`` from line 5 on."""
    defaults = "defaults: [override /model: tiny, override /data: glue/toy, override /method: dora]"
    Path(name).write_text(f"# @package _global_\n# Mine.\n{defaults}\n\n{text}", encoding="utf-8")
    return f"recipe={name}"


# ---- unknown keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_mistyped_key_on_the_command_line_is_refused_with_its_neighbours(refusal, plus):
    error = refusal("recipe=toy", f"{plus}shedule.start=0.2")
    assert error.message == "unknown key 'shedule.start'"
    assert "did you mean 'schedule.start'" in error.hint
    assert "name, start, end, power" in error.hint


def test_a_key_without_its_section_is_found(refusal):
    assert "'train.learning_rate'" in refusal("recipe=toy", "learning_rate=1e-3").hint


def test_a_mistyped_key_in_a_recipe_is_refused_with_file_and_line(refusal):
    error = refusal(recipe("budget: r8\ntrain:\n  epochs: 3\n  lerning_rate: 1e-3\n"))
    assert error.message == "unknown key 'train.lerning_rate'"
    assert error.where == "in mine.yaml, line 8"
    assert "'train.learning_rate'" in error.hint


@pytest.mark.parametrize(
    ("file", "text", "key"),
    [
        ("model/tiny.yaml", "# T.\nname: x\nrevison: main\n", "model.revison"),
        ("data/glue/toy.yaml", "# T.\nname: x\nmaxlength: 3\n", "data.maxlength"),
        ("tuned/glue/toy/dora.yaml", "# @package _global_\ntrain:\n  epoch: 7\n", "train.epoch"),
        ("method/dora.yaml", "# @package _global_\nadaptor:\n  rank: 7\n", "adaptor.rank"),
        ("adapter/components.yaml", "name: components\n# C.\nrnak: 7\n", "adapter.rnak"),
        ("recipe/toy.yaml", "# @package _global_\n# R.\nseeed: 7\n", "seeed"),
    ],
)
def test_a_mistyped_key_in_any_file_is_refused_with_file_and_line(refusal, library, file, text, key):
    path = library / file
    path.parent.mkdir(exist_ok=True)
    if file.startswith("recipe"):
        text += "defaults: [override /model: tiny, override /data: toy]\n"
    path.write_text(text)
    overrides = ["adapter=components"] if file.startswith("method") else []
    error = refusal("recipe=toy", *overrides)
    assert error.message == f"unknown key '{key}'"
    assert error.where == f"in {path}, line 3"
    assert "did you mean" in error.hint


def test_keys_below_a_mapping_are_free(composed):
    run = composed("recipe=toy", "data.columns.premise=p", "+data.splits.validation=dev", "data.columns.text=my column")
    assert run.config.data.columns == {"text": "my column", "label": "label", "premise": "p"}
    assert run.config.data.splits == {"validation": "dev"}


def test_a_whole_mapping_may_be_given(composed):
    run = composed("recipe=toy", "data.splits={validation: dev, test: final}")
    assert run.config.data.splits == {"validation": "dev", "test": "final"}


def test_but_not_two_levels_below(refusal):
    assert "data.columns.a.b" in refusal("recipe=toy", "data.columns.a.b=x").message


def test_keys_are_not_removed(refusal):
    error = refusal("recipe=toy", "~train.epochs")
    assert "cannot be removed" in error.message and "train.epochs=null" in error.hint


@pytest.mark.parametrize("override", ["hydra.run.dir=x", "hydra/launcher=joblib", "+hydra.job.chdir=true"])
def test_hydras_own_keys_are_refused(refusal, override):
    assert refusal("recipe=toy", override).message == f"'{override.lstrip('+').split('=')[0]}' is Hydra's own key"


def test_hydras_own_keys_are_refused_in_a_file(refusal):
    error = refusal(recipe("hydra:\n  run:\n    dir: x\n"))
    assert error.message == "'hydra.run.dir' is Hydra's own key" and error.where == "in mine.yaml, line 7"


def test_a_section_is_not_a_value(refusal):
    assert "group of keys" in refusal("recipe=toy", "train=3").message


@pytest.mark.parametrize("line", ["adapter: lora", "method: dora", "model: tiny"])
def test_a_choice_written_as_a_value_says_the_right_form(refusal, line):
    error = refusal(recipe(line + "\n"))
    assert f"'- override /{line.split(':')[0]}: NAME'" in error.hint and error.where == "in mine.yaml, line 5"


def test_an_empty_section_is_refused_with_its_line(refusal):
    assert refusal(recipe("seed: 2\ntrain:\n")).where == "in mine.yaml, line 6"


def test_dots_in_a_files_key_are_refused(refusal):
    error = refusal(recipe("train.epochs: 3\n"))
    assert "'train.epochs' has a dot" in error.message and error.where.endswith("line 5")


# ---- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("recipe=tyo", "toy"),
        ("method=dorra", "dora"),
        ("schedule=cubik_late", "cubic_late"),
        ("model=tinny", "tiny"),
        ("data=glue/toi", "glue/toy"),
        ("importance=componentnorm", "component_norm"),
    ],
)
def test_a_mistyped_choice_is_refused_with_its_neighbours(refusal, override, near):
    error = refusal("recipe=toy", override)
    group, name = override.split("=")
    assert error.message == f"unknown {group} '{name}'"
    assert f"did you mean '{near}'" in error.hint


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("override /schedule: cubik_late", "unknown schedule 'cubik_late'"),
        ("override /method: dorra", "unknown method 'dorra'"),
        ("override /data: glue/toi", "unknown data 'glue/toi'"),
    ],
)
def test_a_mistyped_choice_in_a_recipe_is_refused_with_file_and_line(refusal, entry, message):
    Path("mine.yaml").write_text(
        f"# @package _global_\n# Mine.\ndefaults:\n  - override /model: tiny\n  - {entry}\n", encoding="utf-8"
    )
    error = refusal("recipe=mine.yaml")
    assert error.message == message
    assert error.where == "in mine.yaml, line 5"
    assert "did you mean" in error.hint


@pytest.mark.parametrize("entry", ["method: dora", "/method: dora", "override method: dora"])
def test_a_defaults_entry_in_the_wrong_form_says_the_right_one(refusal, entry):
    Path("mine.yaml").write_text(f"defaults: [override /model: tiny, override /data: toy, {entry}]\n")
    error = refusal("recipe=mine.yaml")
    assert error.hint == "write '- override /method: dora'" and error.where == "in mine.yaml, line 1"


def test_no_recipe_lists_them(refusal):
    error = refusal("seed=1")
    assert error.message == "no recipe is given" and "toy" in error.hint


def test_a_recipe_file_that_is_not_there(refusal):
    assert refusal("recipe=nowhere/x.yaml").message == "recipe=nowhere/x.yaml: there is no such file"


def test_a_run_folder_as_recipe_points_at_its_file(refusal):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("seed: 1\n")
    assert "recipe=run/config.yaml" in refusal("recipe=run").hint


def test_a_config_dir_that_is_none(refusal):
    from dora_cli.config.compose import compose
    from dora_cli.errors import UserError

    with pytest.raises(UserError, match="--config-dir nowhere is not a folder"):
        compose(["recipe=toy"], {}, ["nowhere"])


@pytest.mark.parametrize("group", ["recipe", "method", "tuned"])
def test_a_global_file_without_its_header_is_refused_or_mended(refusal, composed, library, group):
    path = (
        library
        / {"recipe": "recipe/toy.yaml", "method": "method/dora.yaml", "tuned": "tuned/glue/toy/dora.yaml"}[group]
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "defaults: [override /model: tiny, override /data: toy]\nseed: 3\n" if group == "recipe" else "seed: 3\n"
    )
    if group == "recipe":
        assert composed("recipe=toy").config.seed == 3
    else:
        error = refusal("recipe=toy")
        assert "# @package _global_" in error.message and str(path) in error.where


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=three", "is not a number"),
        ("train.batch_size=1.5", "is not a whole number"),
        ("train.batch_size=1e3", "is not a whole number"),
        ("train.batch_size=true", "is not a whole number"),
        ("train.compile=3", "is not true or false"),
        ("train.compile=maybe", "is not true or false"),
        ("train.max_steps=[1]", "is not a whole number or null"),
        ("train.eval_every=often", "is not a number or null"),
        ("data.labels=3", "is not a list such as [a, b] or null"),
        ("data.labels=[a={b}]", "is not a list such as [a, b] or null"),
        ("data.metrics={a: b}", "is not a list such as [a, b]"),
        ("data.columns=[a]", "is not a mapping"),
        ("adapter.rank=many", "is not a whole number or null"),
        ("adapter.decay_gates=2", "is not true or false"),
        ("train.batch_size=0", "is out of range"),
        ("train.learning_rate=nan", "is not a finite number"),
        ("train.learning_rate=-inf", "is not a finite number"),
        ("data.holdout=1.0", "is out of range"),
        ("adapter.dropout=1.0", "is out of range"),
        ("train.scheduler=cosin", "is not offered"),
        ("regularizer.normaliser=papr", "is not offered"),
        ("train.warmup=1.5", "is neither a share of the run (below 1) nor a whole number of steps"),
    ],
)
def test_wrong_values_are_refused_from_the_command_line(refusal, override, expected):
    error = refusal("recipe=toy", override)
    assert error.message.startswith(override.partition("=")[0])
    assert expected in error.message
    assert error.where is None


@pytest.mark.parametrize(
    ("section", "line", "expected"),
    [
        ("train", "epochs: three", "train.epochs=three is not a number"),
        ("train", "batch_size: 1.5", "train.batch_size=1.5 is not a whole number"),
        ("train", "learning_rate: .nan", "train.learning_rate=nan is not a finite number"),
        ("data", "path: [a]", "data.path=[a] is not text or null"),
        ("data", "metrics: {a: b}", "'data.metrics.a': data.metrics is a list such as [a, b] and has no keys below it"),
        ("adapter", "rank: 0", "adapter.rank=0 is out of range"),
        ("regularizer", "normaliser: papr", "regularizer.normaliser=papr is not offered"),
    ],
)
def test_wrong_values_are_refused_from_a_file_with_its_line(refusal, section, line, expected):
    error = refusal(recipe(f"{section}:\n  {line}\n"))
    assert error.message == expected
    assert error.where == "in mine.yaml, line 6"


def test_a_range_is_said(refusal):
    assert refusal("recipe=toy", "data.holdout=2").hint == "it must be above 0.0 and below 1.0"
    assert refusal("recipe=toy", "train.batch_size=0").hint == "it must be 1 or more"


def test_an_unquoted_no_in_a_list_of_labels_is_not_taken_for_text(refusal):
    error = refusal(recipe("data:\n  labels: [no, yes]\n"))
    assert "truth value false" in error.message and error.where == "in mine.yaml, line 6"


def test_numbers_are_fine_as_text(composed):
    assert composed(recipe("data:\n  labels: [0, 1]\n")).config.data.labels == ["0", "1"]
    assert composed("recipe=toy", "data.config=3").config.data.config == "3"


def test_a_number_without_a_point_reads_as_a_number(composed):
    assert composed(recipe("train:\n  learning_rate: 8e-4\n")).config.train.learning_rate == 8e-4
    assert composed("recipe=toy", "train.learning_rate=8e-4").config.train.learning_rate == 8e-4


def test_a_value_that_an_interpolation_brings_is_checked_too(refusal):
    assert "is out of range" in refusal("recipe=toy", "train.workers=-3", "train.batch_size=${train.workers}").message
    assert refusal("recipe=toy", "data.metrics=${seed}").message.startswith("data.metrics=1 is not a list")
    assert "cannot resolve" in refusal(recipe("train:\n  batch_size: ${nowhere}\n")).message


def test_an_interpolation_that_does_not_end_is_refused(refusal):
    error = refusal("recipe=toy", "data.path=${x")
    assert error.message == "cannot read data.path=${x" and error.where is None


def test_no_model_is_said(refusal, library):
    (library / "model" / "tiny.yaml").write_text("# T.\nrevision: main\n")
    assert refusal("recipe=toy").message == "model.name is not set"


def test_no_data_is_said(refusal):
    assert refusal("recipe=toy", "data.name=null").message == "there is no data"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resume=true", "overwrite=true"], "resume=true goes on"),
        (["data.labels=[a,b,a]"], "names a label twice"),
        (["data.labels=[a]"], "nothing to choose between"),
    ],
)
def test_contradictions_are_said(refusal, overrides, message):
    assert message in refusal("recipe=toy", *overrides).message


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_an_option_that_the_chosen_part_does_not_read_is_refused_from_the_command_line(refusal):
    error = refusal("recipe=toy", "schedule.power=2")
    assert error.message == "schedule.power=2: schedule=cubic_late does not read it"
    assert error.where == "schedule=cubic_late reads schedule.start, schedule.end"
    assert error.hint == "schedule.power is read by power"


def test_the_name_of_a_part_is_chosen_by_its_group(refusal):
    assert "adapter=svd" in refusal("recipe=toy", "adapter.name=svd").hint
    error = refusal(recipe("adapter:\n  name: svd\n"))
    assert "adapter.name: svd" in error.message and error.where == "in mine.yaml, line 6"


def test_a_rule_of_the_parts_own_gets_the_files_line(refusal):
    error = refusal(recipe("schedule:\n  start: 0.9\n"))
    assert error.message == "schedule.start=0.9 lies after schedule.end=0.5"
    assert error.where == "in mine.yaml, line 6"


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("train:\n  epochs: 3\n bad: 1\n", "malformed YAML", 7),
        ("seed: 1\nseed: 2\n", "malformed YAML: found duplicate key seed", 6),
        ("seed: [1\n", "malformed YAML", 6),
        ("data:\n  name: a: b\n", "malformed YAML", 6),
        ("seed: !!python/object/apply:os.system [ls]\n", "malformed YAML", 5),
        ("---\nseed: 1\n", "malformed YAML", 5),
        ("data:\n  columns:\n    on: a\n", "the key 'data.columns.True' is not text", 7),
    ],
)
def test_malformed_yaml_names_file_and_line(refusal, text, message, line):
    error = refusal(recipe(text))
    assert message in error.message
    assert error.where == f"in mine.yaml, line {line}"


def test_malformed_yaml_in_a_group_file_names_it(refusal, library):
    (library / "model" / "tiny.yaml").write_text("name: 'x\n")
    error = refusal("recipe=toy")
    assert "malformed YAML" in error.message and "tiny.yaml" in error.where


@pytest.mark.parametrize("text", ["just text\n", "- a\n- b\n", "3\n"])
def test_a_file_that_holds_no_keys_is_refused(refusal, text):
    Path("mine.yaml").write_text(text)
    assert "must hold keys and values" in refusal("recipe=mine.yaml").message


def test_a_file_that_is_not_text_is_refused(refusal, library):
    Path("mine.yaml").write_bytes(b"seed: \xff\xfe\n")
    assert "not UTF-8" in refusal("recipe=mine.yaml").message
    (library / "data" / "glue" / "toy.yaml").write_bytes(b"name: \xe9\n")
    assert "not UTF-8" in refusal("recipe=toy").message


def test_a_file_that_is_nested_without_end_is_refused(refusal):
    Path("mine.yaml").write_text("a: " + "[" * 5000)
    assert "nested too deeply" in refusal("recipe=mine.yaml").message


def test_a_recipe_with_another_package_is_refused(refusal):
    Path("mine.yaml").write_text("# @package train\nepochs: 3\n")
    assert "# @package _global_" in refusal("recipe=mine.yaml").message


@pytest.mark.parametrize("defaults", ["defaults: 3", "defaults: {a: b}", "defaults: [{a: b, c: d}]", "defaults: [[a]]"])
def test_a_defaults_list_that_is_none_is_refused_with_its_line(refusal, defaults):
    Path("mine.yaml").write_text(f"seed: 1\n{defaults}\n")
    error = refusal("recipe=mine.yaml")
    assert "defaults" in error.message and error.where == "in mine.yaml, line 2"


def test_a_recipe_that_sweeps_asks_for_m(refusal, composed):
    source = recipe("hydra:\n  sweeper:\n    params:\n      train.epochs: 1,2\n")
    error = refusal(source)
    assert error.message == "recipe mine is a sweep over train.epochs"
    assert error.hint == "add -m" and error.where == "in mine.yaml, line 8"
    assert composed(source, "train.epochs=2").config.train.epochs == 2
