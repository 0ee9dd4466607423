"""The three ways to say a budget, and what they come to."""

import pytest

from dora_cli.allocation.budget import parse_budget, resolve, spread
from dora_cli.errors import UserError


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        (0.1, "share", 0.1),
        ("0.25", "share", 0.25),
        ("340k", "params", 340_000),
        ("0.34M", "params", 340_000),
        (340000, "params", 340_000),
        ("r4", "average", 4),
        ("r0.5", "average", 0.5),
        ("R8", "average", 8),
    ],
)
def test_each_form_is_read(text: object, kind: str, value: float) -> None:
    budget = parse_budget(text)
    assert budget is not None
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))


@pytest.mark.parametrize("text", [0, 1.0, 1.5, -0.1, "r0", "abc", "r4k", "", "10%", True, "nan"])
def test_what_is_no_budget_is_refused(text: object) -> None:
    with pytest.raises(UserError, match="budget"):
        parse_budget(text)


def test_no_budget_is_none() -> None:
    assert parse_budget(None) is None


def test_share_and_average_round_over_all_modules() -> None:
    costs = [768] * 36
    assert resolve(parse_budget(0.1), costs, 12, shrinks=True).limit == round(0.1 * 36 * 12)  # type: ignore[arg-type]
    assert resolve(parse_budget("r1.25"), costs, 12, shrinks=True).limit == 45  # type: ignore[arg-type]


def test_start_rank_is_one_and_a_half_times_the_average() -> None:
    assert parse_budget("r8").start_rank([768] * 4) == 12  # type: ignore[union-attr]
    assert parse_budget("r1").start_rank([768] * 4) == 2  # type: ignore[union-attr]
    assert parse_budget("24576").start_rank([768] * 4) == 12  # type: ignore[union-attr]
    assert parse_budget("0.5").start_rank([768] * 4) is None  # type: ignore[union-attr]


def test_a_start_ratio_that_floats_cannot_say_starts_no_component_higher() -> None:
    assert parse_budget("r10").start_rank([768], ratio=1.1) == 11  # type: ignore[union-attr]
    assert parse_budget("30720").start_rank([768] * 4, ratio=1.1) == 11  # type: ignore[union-attr]
    assert parse_budget("r10").start_rank([768], ratio=1.11) == 12  # type: ignore[union-attr]


def test_a_budget_above_the_start_says_both_numbers() -> None:
    with pytest.raises(UserError) as error:
        resolve(parse_budget("r16"), [768] * 72, 8, shrinks=True)  # type: ignore[arg-type]
    assert "576" in str(error.value)
    assert "1,152" in str(error.value)


def test_a_budget_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no component"):
        resolve(parse_budget(0.001), [768] * 10, 4, shrinks=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no component"):
        resolve(parse_budget("500"), [768] * 10, 4, shrinks=True)  # type: ignore[arg-type]


def test_a_share_needs_a_start_rank() -> None:
    with pytest.raises(UserError, match=r"adapter\.rank"):
        resolve(parse_budget(0.1), [768], None, shrinks=True)  # type: ignore[arg-type]


def test_static_methods_spread_evenly_with_the_remainder_in_module_order() -> None:
    costs = [10, 20, 30, 40]
    assert spread(resolve(parse_budget("r2.5"), costs, None, shrinks=False), costs) == [3, 3, 2, 2]  # type: ignore[arg-type]
    # 2 rounds cost 200; of the 45 left, 10 + 20 fit, 30 does not
    assert spread(resolve(parse_budget("245"), costs, None, shrinks=False), costs) == [3, 3, 2, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1e308b", "r1e999", "1e305k", "r1e15", 1e15])
def test_more_than_any_model_has_is_refused(text: object) -> None:
    with pytest.raises(UserError, match="out of range"):
        parse_budget(text)


def test_a_number_of_parameters_below_one_is_no_share() -> None:
    with pytest.raises(UserError, match="out of range"):
        parse_budget("0.0005k")
