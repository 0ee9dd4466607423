"""Values as a shell hands them over: paths, equals signs, commas, quotes, and sweeps."""

import contextlib

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dora_cli.config.check import known_keys
from dora_cli.config.compose import root_schema
from dora_cli.config.overrides import parse, parse_sweep
from dora_cli.config.recipes import check_names, search_folders
from dora_cli.config.schema import Config
from dora_cli.errors import UserError


@pytest.fixture
def value_of(parts):
    """What ``key=text`` comes to, and that Hydra reads the line handed to it as the same."""
    keys = known_keys(root_schema(parts))

    def read(argument):
        (override,) = parse([argument], keys)
        assert OverridesParser.create().parse_override(override.line).value() == override.value
        return override.value

    return read


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
def test_text_arrives_as_typed(value_of, key, text):
    assert value_of(f"{key}={text}") == text


def test_text_arrives_in_the_configuration(composed):
    run = composed(
        "recipe=toy", r"data.path=C:\a=b, c\x.csv", "model.name=package://a/b", "data.columns.text=my column"
    )
    assert run.config.data.path == r"C:\a=b, c\x.csv"
    assert run.config.model.name == "package://a/b"
    assert run.config.data.columns["text"] == "my column"


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
def test_targets_may_be_a_suffix_a_regex_or_a_list(value_of, text, value):
    assert value_of(f"adapter.targets={text}") == value


@pytest.mark.parametrize(
    ("text", "value"), [("0.1", 0.1), ("340k", "340k"), ("r4", "r4"), ("1e5", 1e5), ("null", None)]
)
def test_a_budget_keeps_its_form(value_of, text, value):
    assert value_of(f"budget={text}") == value


@pytest.mark.parametrize("key", ["model.add_tokens", "data.labels"])
def test_words_of_a_list_need_no_quotes(value_of, key):
    assert value_of(f"{key}=[<|im_start|>, <go>,a=b]") == ["<|im_start|>", "<go>", "a=b"]
    assert value_of(f"{key}=[don't,know?!]") == ["don't", "know?!"]


def test_quotes_of_the_users_are_taken_off(value_of):
    assert value_of("data.path='a b'") == "a b"
    assert value_of('data.config="x,y"') == "x,y"


def test_null_unsets_text(value_of):
    assert value_of("data.config=null") is None


@pytest.mark.parametrize(
    "override",
    ["budget=0.1,0.2", "train.learning_rate=1e-3,1e-4", "method=dora,lora", "seed=range(1,4)", "data.task=a,b"],
)
def test_several_values_for_one_run_suggest_m(refusal, override):
    error = refusal("recipe=toy", override)
    assert error.message == f"{override} gives several values to one run"
    assert error.hint.startswith("-m makes one run of each")
    assert ("one list" in error.hint) == override.startswith(("budget", "data.task"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("toy", "'toy' is not key=value"),
        ("mine.yaml", "'mine.yaml' is not key=value"),
        ("=3", "cannot read '=3'"),
        ("data.columns.=x", "cannot read 'data.columns.=x'"),
        ("data.columns.über=x", "cannot read 'data.columns.über=x'"),
        ("a b=3", "cannot read 'a b=3'"),
        ("seed=", "seed= has no value"),
        ("data@x=glue/toy", "cannot read 'data@x=glue/toy'"),
    ],
)
def test_what_is_no_override_is_refused(refusal, argument, message):
    assert refusal("recipe=toy", argument).message == message


def sweep(*arguments):
    return parse_sweep(arguments, known_keys(Config), [])


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 900 + "]" * 900])
def test_endless_digits_and_brackets_are_refused(refusal, text):
    assert "is not a whole number" in refusal("recipe=toy", f"seed={text}").message


@pytest.mark.parametrize("folder", ["~nobody-of-this-name/x", "x" * 5000])
def test_folders_that_no_system_has_are_refused(library, folder):
    with pytest.raises(UserError, match="is not a folder"):
        search_folders([folder])
    with pytest.raises(UserError, match="unknown method"):
        check_names([f"method={folder}"], [library])


def test_sweeps_are_lists_ranges_and_choices():
    shared, axes = sweep("recipe=toy", "budget=0.1,r4", "seed=range(1,4)", "train.epochs=choice(1,2.5)", "out=x y")
    assert shared == ["recipe=toy", "out=x y"]
    assert axes == {"budget": ["0.1", "r4"], "seed": ["1", "2", "3"], "train.epochs": ["1", "2.5"]}


def test_swept_text_survives_the_second_command_line(value_of):
    _, axes = sweep(r"data.path=/a=b/x y.csv,C:\d\e.csv,it's.csv", "adapter.targets=[a,b],'x,y'")
    paths = [value_of(f"data.path={value}") for value in axes["data.path"]]
    assert paths == ["/a=b/x y.csv", r"C:\d\e.csv", "it's.csv"]
    targets = [value_of(f"adapter.targets={value}") for value in axes["adapter.targets"]]
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


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1))
def test_any_text_for_a_path_arrives_or_is_refused_in_our_words(value_of, text):
    """Quotes around the whole and null have a meaning; everything else is the text."""
    try:
        value = value_of(f"data.path={text}")
    except UserError:
        assert not text.strip()
    else:
        assert value == text or text[0] == text[-1] in "'\"" or text.lower() == "null"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["budget", "adapter.targets", "data.labels", "seed", "method"]), st.text())
def test_no_value_raises_anything_but_our_own_error(parts, key, text):
    with contextlib.suppress(UserError):
        parse([f"{key}={text}"], known_keys(root_schema(parts)))
