"""Comparisons: which runs repeat which, and the arithmetic over them."""

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_cli.config.differences import FREE_ON_RESUME
from dora_cli.errors import UserError
from dora_cli.reporting.compare import Mean, check_baseline, compare, mean_of, paired, params_of, pareto, value_of
from dora_cli.reporting.compare_charts import charts, mean_curve, spread
from dora_cli.reporting.compare_tables import cautions, mark, markdown, plus_minus, text_table
from dora_cli.reporting.runs import Run, read_run

MakeRun = Callable[..., Path]
numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


def read(*folders: Path) -> list[Run]:
    return [read_run(folder) for folder in folders]


def edit(folder: Path, more: str) -> Path:
    """Add keys to a run's configuration."""
    with (folder / "config.yaml").open("a") as file:
        file.write(more)
    return folder


@given(st.lists(numbers, max_size=6))
def test_means_and_deviations_are_numpys(values: list[float]) -> None:
    found = mean_of(values)
    if not values:
        assert found is None
        return
    assert found is not None and found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values))
    if len(values) == 1:
        assert found.sd is None, "one run says nothing about noise"
    else:
        assert found.sd == pytest.approx(np.std(values, ddof=1), abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_a_sweep_from_the_cheapest_finds(points: list[tuple[float, float]]) -> None:
    kept, best = set(), -math.inf
    for cost in sorted({cost for cost, _ in points}):
        top = max(quality for c, quality in points if c == cost)
        if top > best:
            kept.add((cost, top))
            best = top
    assert pareto(points) == [point in kept for point in points]


@given(st.lists(st.floats(-20, 320), min_size=1, max_size=12), st.floats(1, 60))
def test_labels_are_spread_in_order_within_the_room_and_as_near_as_may_be(wanted: list[float], gap: float) -> None:
    room = 300.0
    places = spread(wanted, gap, room)
    gap = min(gap, room / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    sorted_places = [places[i] for i in order]
    assert all(b - a >= gap - 1e-6 for a, b in pairwise(sorted_places))
    assert sorted_places[0] >= -1e-6 and sorted_places[-1] <= room + 1e-6
    inside = [min(max(w, 0), room) for w in wanted]
    if all(inside[b] - inside[a] >= gap for a, b in pairwise(order)):
        assert places == pytest.approx(inside), "what does not touch is not moved"


def test_two_labels_at_one_place_move_apart_by_the_same() -> None:
    assert spread([50, 50], 10, 300) == [45, 55]
    assert spread([2, 2, 100], 10, 300) == [0, 10, 100]


def test_runs_that_differ_in_the_seed_alone_are_a_group(make_run: MakeRun) -> None:
    runs = read(
        *(make_run(f"d{seed}", seed=seed, value=0.8 + seed / 100) for seed in (3, 1, 2)),
        *(make_run(f"l{seed}", method="lora", seed=seed, value=0.82, params=500) for seed in (1, 2)),
        make_run("small", budget=0.1, params=300, value=0.7),
        make_run("again", seed=3, value=0.1),
        make_run("half", seed=4, finished=False),
    )
    (setting,), notes = compare(runs, FREE_ON_RESUME)
    assert [group.label for group in setting.groups] == ["dora 0.1", "dora 0.25", "lora 0.25"]
    dora = setting.groups[1]
    assert [run.seed for run in dora.finished] == [1, 2, 3] and [run.seed for run in dora.unfinished] == [4]
    assert dora.metric == Mean(pytest.approx(0.82), pytest.approx(0.01), 3), "the unfinished and the repeated count not"
    assert len(notes) == 1 and "again is not counted: it repeats" in notes[0]
    assert dora.ranks == runs[0].ranks
    assert list(setting.differing())[:2] == ["method", "budget"] and len(setting.differing()) == 2
    assert [group.label for group in setting.front] == ["dora 0.1", "lora 0.25"]


def test_groups_of_one_method_and_budget_are_told_apart_by_what_differs(make_run: MakeRun) -> None:
    folders = [make_run(f"r{i}", rate=rate, seed=i) for i, rate in enumerate((0.001, 0.01, 0.01))]
    edit(folders[0], "  log_every: 5\n")  # makes no difference
    (setting,), _ = compare(read(*folders), FREE_ON_RESUME)
    assert [group.label for group in setting.groups] == [
        "dora 0.25 learning_rate=0.001",
        "dora 0.25 learning_rate=0.01",
    ]
    assert setting.differing() == {"train.learning_rate": [0.001, 0.01]}


def test_another_metric_or_other_rows_are_another_setting(make_run: MakeRun) -> None:
    plain, other, loss = make_run("plain"), edit(make_run("other"), "data:\n  path: x/b.csv\n"), make_run("loss")
    summary = json.loads((loss / "summary.json").read_text())
    summary["best"] = summary["last"] = {"step": 40, "name": "loss", "value": 0.05}
    (loss / "summary.json").write_text(json.dumps(summary))
    longer = edit(make_run("longer"), "data:\n  max_length: 7\n")
    fewer = edit(make_run("fewer"), "data:\n  path: b.csv\n  max_eval_samples: 9\n")
    settings, _ = compare(read(plain, other, loss, longer, fewer), FREE_ON_RESUME)
    assert [(s.data, s.metric, s.higher, len(s.groups)) for s in settings] == [
        ("toy", "accuracy", True, 2),
        ("b.csv (data.path=x/b.csv, data.max_eval_samples=None)", "accuracy", True, 1),
        ("toy", "loss", False, 1),
        ("b.csv (data.path=b.csv, data.max_eval_samples=9)", "accuracy", True, 1),
    ]


def test_of_losses_the_lowest_is_the_best(make_run: MakeRun) -> None:
    folders = [make_run(f"m{i}", method=f"m{i}", params=100 * (i + 1)) for i in range(3)]
    for folder, value in zip(folders, (0.5, 0.3, 0.4), strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        summary["best"] = {"step": 40, "name": "loss", "value": value}
        summary["last"] = {"step": 40, "name": "loss", "value": value}
        (folder / "summary.json").write_text(json.dumps(summary))
    (setting,), _ = compare(read(*folders), FREE_ON_RESUME)
    assert setting.best.method == "m1"
    assert [group.method for group in setting.front] == ["m0", "m1"]


def test_what_was_saved_is_what_counts(make_run: MakeRun) -> None:
    folder = make_run()
    summary = json.loads((folder / "summary.json").read_text())
    summary["last"]["value"] = 0.5
    (folder / "summary.json").write_text(json.dumps(summary))
    assert value_of(read_run(folder)) == 0.8
    assert value_of(read_run(edit(folder, "save:\n  which: last\n"))) == 0.5
    summary["budget"]["params_end"] = 0
    (folder / "summary.json").write_text(json.dumps(summary))
    assert params_of(read_run(folder)) == 600, "of full fine-tuning, what was trained but for the head"


def test_differences_are_taken_seed_by_seed(make_run: MakeRun) -> None:
    ours, theirs = {1: 0.80, 2: 0.90, 5: 0.1}, {1: 0.70, 2: 0.60, 3: 0.9}
    runs = read(
        *(make_run(f"a{s}", seed=s, value=v) for s, v in ours.items()),
        *(make_run(f"b{s}", seed=s, value=v, method="lora") for s, v in theirs.items()),
    )
    (setting,), _ = compare(runs, FREE_ON_RESUME)
    dora, lora = setting.groups
    found = paired(dora, lora)
    assert found == Mean(pytest.approx(0.2), pytest.approx(math.sqrt(0.02)), 2)
    assert paired(dora, dora) is None
    assert setting.references("dora") == {"dora 0.25": dora, "lora 0.25": dora}
    assert setting.references(None)["dora 0.25"] is setting.best is lora
    with pytest.raises(UserError, match="baseline=loar is none of these runs") as caught:
        check_baseline("loar", [setting])
    assert "'lora'" in caught.value.hint


def test_a_baseline_with_several_budgets_is_taken_at_the_same_one(make_run: MakeRun) -> None:
    runs = read(*(make_run(f"{m}{b}", method=m, budget=b) for m in ("dora", "lora") for b in (0.1, 0.2)))
    runs += read(make_run("full", method="full", budget=None))
    (setting,), _ = compare(runs, FREE_ON_RESUME)
    found = {label: reference.label for label, reference in setting.references("lora").items()}
    assert found == {"dora 0.1": "lora 0.1", "dora 0.2": "lora 0.2", "lora 0.1": "lora 0.1", "lora 0.2": "lora 0.2"}


def test_a_baseline_is_taken_where_other_keys_are_the_same_too(make_run: MakeRun) -> None:
    runs = read(*(make_run(f"{m}{r}", method=m, rate=r) for m in ("dora", "lora") for r in (0.1, 0.2)))
    (setting,), _ = compare(runs, FREE_ON_RESUME)
    found = {label: reference.label for label, reference in setting.references("lora").items()}
    assert found["dora 0.25 learning_rate=0.1"] == "lora 0.25 learning_rate=0.1"
    assert found["dora 0.25 learning_rate=0.2"] == "lora 0.25 learning_rate=0.2"


def test_the_best_and_those_within_its_noise_are_marked(make_run: MakeRun) -> None:
    values = {"a": (0.90, 0.94), "b": (0.89, 0.91), "c": (0.70, 0.72)}  # means 0.92 ± 0.028, 0.90, 0.71
    runs = read(
        *(make_run(f"{m}{s}", method=m, seed=s, value=v) for m, both in values.items() for s, v in enumerate(both))
    )
    (setting,), _ = compare(runs, FREE_ON_RESUME)
    assert [mark(setting, group) for group in setting.groups] == ["*", "~", ""]
    assert not list(cautions(setting))
    (setting,), _ = compare([*runs, *read(make_run("d", method="d", value=0.99))], FREE_ON_RESUME)
    assert "d 0.25, was run once" in next(cautions(setting))


def test_seeds_that_held_out_rows_of_their_own_are_said(make_run: MakeRun) -> None:
    folders = [make_run(f"r{seed}", seed=seed) for seed in (1, 2)]
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"held_out": 10}))
    (setting,), _ = compare(read(*folders), FREE_ON_RESUME)
    assert list(cautions(setting)) == [
        "each seed held out other validation rows: runs of one seed, as in the differences, share theirs"
    ]
    (setting,), _ = compare(read(folders[0]), FREE_ON_RESUME)
    assert not list(cautions(setting)), "one seed, the same rows"


def test_a_head_that_beats_all_adapters_leaves_no_front_to_draw(make_run: MakeRun) -> None:
    runs = read(make_run("h", method="head", budget=None, params=0, value=0.9), make_run("l", method="lora", value=0.8))
    (setting,), _ = compare(runs, FREE_ON_RESUME)
    assert [group.label for group in setting.front] == ["head"]
    drawn = charts(setting)["quality"].inline()
    assert "head: no adapter" in drawn and "lora 0.25" in drawn and "Pareto front" not in drawn


def test_curves_are_means_over_the_steps_that_all_have(make_run: MakeRun) -> None:
    runs = read(make_run("a", value=0.8), make_run("b", seed=2, value=0.6))
    assert mean_curve(runs, "accuracy") == pytest.approx({10: 0.4, 20: 0.5, 30: 0.6, 40: 0.7})
    half = read(make_run("c", finished=False))
    assert list(mean_curve([*runs, *half], "accuracy")) == [10, 20]
    assert mean_curve([], "accuracy") == {}


@pytest.mark.parametrize(
    ("mean", "text"),
    [
        (Mean(0.93751, 0.0131, 3), "0.938 ± 0.013"),
        (Mean(0.9, 0.0, 2), "0.9 ± 0"),
        (Mean(0.93751, None, 1), "0.9375"),
        (Mean(1234.5, 21.0, 2), "1,234 ± 21"),
        (None, "–"),
    ],
)
def test_a_mean_is_written_as_exactly_as_its_deviation_allows(mean: Mean | None, text: str) -> None:
    assert plus_minus(mean) == text


def test_the_printed_table_fits_80_columns_whatever_the_labels(make_run: MakeRun) -> None:
    runs = read(
        *(make_run(f"m{i}{s}", method="long_name_" * i, seed=s, value=0.5 + i / 10) for i in (1, 4) for s in (1, 2)),
        make_run("other", method="a_name_that_is_longer_than_any_terminal_" * 3),
    )
    (setting,), _ = compare(runs, FREE_ON_RESUME)
    lines = text_table(setting, setting.references(None))
    assert max(map(len, lines)) <= 80
    assert lines[0] == "accuracy on toy, higher is better" and "…" in lines[-1] and "600" in lines[-1]


def test_values_of_several_lines_or_with_a_bar_break_no_table(make_run: MakeRun) -> None:
    templates = (r"Text: {text}\n| Answer:", r"{text} |\n\n")
    folders = [edit(make_run(f"r{i}"), f'data:\n  template: "{text}"\n') for i, text in enumerate(templates)]
    long = ", ".join(f"a: column {i}\\n" for i in range(20))
    folders.append(edit(make_run("other"), f'data:\n  columns: {{text: "{long}"}}\n'))
    settings, _ = compare(read(*folders), FREE_ON_RESUME)
    references = [setting.references(None) for setting in settings]
    assert [group.suffix for group in settings[0].groups] == [
        " 0.25 template=Text: {text} | Answer:",
        " 0.25 template={text} |",
    ]
    lines = [text_table(setting, of_setting) for setting, of_setting in zip(settings, references, strict=True)]
    assert max(len(line) for table in lines for line in table) <= 80
    assert "\n" not in "".join(lines[0]) and "column 19" in " ".join(lines[1])
    for line in markdown(settings, references).splitlines():
        assert line[:1] != "|" or len(re.findall(r"(?<!\\)\|", line)) == 10, line


def test_nothing_finished_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="none of these runs is finished"):
        compare(read(make_run(finished=False)), FREE_ON_RESUME)
