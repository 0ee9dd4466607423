"""Values as a shell hands them over: paths, equals signs, commas, quotes, and sweeps."""

import pytest

from dora_cli.config.check import known_keys
from dora_cli.config.overrides import parse_sweep
from dora_cli.config.schema import Config
from dora_cli.errors import UserError


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("data.path", "/tmp/a=b/c.csv"),
        ("data.path", "/tmp/a,b.csv"),
        ("data.path", "a,b.csv"),
        ("data.path", r"C:\Users\me\my data\x.csv"),
        ("data.path", "/tmp/{a}[b](c)'d\".csv"),
        ("data.path", "it's.csv"),
        ("data.path", "true"),
        ("data.path", "007"),
        ("data.path", "ends with a backslash\\"),
        ("data.path", "a:b"),
        ("data.path", "naïve/ünï.csv"),
        ("model.name", "package://a/b"),
        ("model.name", "org/model-v1.5"),
        ("out", "runs/x y, z=1"),
        ("data.columns.text", "my column"),
        ("data.columns.text", "a,b"),
        ("data.columns.text", "[text]"),
        ("data.config", "2024-01"),
    ],
)
def test_text_arrives_as_typed(composed, key, text):
    value = composed("recipe=toy", f"{key}={text}").config
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    assert value == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r".*\.(query|key)", r".*\.(query|key)"),
        (r"layer\.[0-3]\..*", r"layer\.[0-3]\..*"),
        ("query", "query"),
        ("[query,key]", ["query", "key"]),
        ("['a.b', c]", ["a.b", "c"]),
        ("'a,b'", "a,b"),
    ],
)
def test_targets_may_be_a_suffix_a_regex_or_a_list(composed, text, value):
    assert composed("recipe=toy", f"adapter.targets={text}").parts["adapter"].targets == value


@pytest.mark.parametrize(
    ("text", "value"), [("0.1", 0.1), ("340k", "340k"), ("r4", "r4"), ("1e5", 1e5), ("null", None)]
)
def test_a_budget_keeps_its_form(composed, text, value):
    assert composed("recipe=toy", f"budget={text}").config.budget == value


def test_quotes_of_the_users_are_taken_off(composed):
    assert composed("recipe=toy", "data.path='a b'").config.data.path == "a b"
    assert composed("recipe=toy", 'data.config="x,y"').config.data.config == "x,y"


def test_null_unsets_text(composed):
    assert composed("recipe=toy", "data.config=null").config.data.config is None


@pytest.mark.parametrize(
    "override",
    ["budget=0.1,0.2", "train.learning_rate=1e-3,1e-4", "method=dora,lora", "seed=range(1,4)", "data.task=a,b"],
)
def test_several_values_for_one_run_suggest_m(refusal, override):
    error = refusal("recipe=toy", override)
    assert error.message == f"{override} gives several values to one run"
    assert "-m" in error.hint


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("toy", "'toy' is not key=value"),
        ("mine.yaml", "'mine.yaml' is not key=value"),
        ("=3", "cannot read '=3'"),
        ("a b=3", "cannot read 'a b=3'"),
        ("seed=", "seed= has no value"),
        ("data@x=glue/toy", "cannot read 'data@x=glue/toy'"),
    ],
)
def test_what_is_no_override_is_refused(refusal, argument, message):
    assert refusal("recipe=toy", argument).message == message


def sweep(*arguments):
    return parse_sweep(arguments, known_keys(Config), [])


def test_sweeps_are_lists_ranges_and_choices():
    shared, axes = sweep("recipe=toy", "budget=0.1,r4", "seed=range(1,4)", "train.epochs=choice(1,2.5)", "out=x y")
    assert shared == ["recipe=toy", "out=x y"]
    assert axes == {"budget": ["0.1", "r4"], "seed": ["1", "2", "3"], "train.epochs": ["1", "2.5"]}


def test_swept_text_survives_the_second_command_line(composed):
    _, axes = sweep(r"data.path=/a=b/x y.csv,C:\d\e.csv,it's.csv", "adapter.targets=[a,b],'x,y'")
    paths = [composed("recipe=toy", f"data.path={value}").config.data.path for value in axes["data.path"]]
    assert paths == ["/a=b/x y.csv", r"C:\d\e.csv", "it's.csv"]
    targets = [
        composed("recipe=toy", f"adapter.targets={value}").parts["adapter"].targets for value in axes["adapter.targets"]
    ]
    assert targets == [["a", "b"], "x,y"]


def test_a_list_or_quoted_text_is_one_value():
    assert sweep("data.labels=[a,b]", "data.config='a,b'")[1] == {}


def test_the_last_of_two_swept_overrides_counts():
    assert sweep("seed=1,2", "seed=3") == (["seed=3"], {})
    assert sweep("seed=3", "seed=1,2") == ([], {"seed": ["1", "2"]})


def test_glob_chooses_among_the_files_of_a_group(library):
    _, axes = parse_sweep(["data=glob(glue/*)", "model=glob(*)"], known_keys(Config), [library])
    assert axes == {"data": ["glue/toy"], "model": ["tiny"]}
    with pytest.raises(UserError, match="names no value"):
        parse_sweep(["model=glob(x*)"], known_keys(Config), [library])


def test_an_interval_has_no_list_of_values():
    with pytest.raises(UserError, match="no list of values"):
        sweep("train.learning_rate=interval(0,1)")
