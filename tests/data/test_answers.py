"""Answers in the shapes that people have them, and those that can't be learned from."""

from typing import Any

import pytest

from dora_cli.data.tasks.answers import read_answers
from dora_cli.data.tasks.conversations import BadRow

CONTEXT = "It rained in Rome. Rome was wet."


@pytest.mark.parametrize(
    ("value", "start", "texts", "learned", "guessed"),
    [
        ({"text": ["wet", "Rome"], "answer_start": [28, 13]}, None, ["wet", "Rome"], "wet", False),
        ([{"text": "Rome", "answer_start": 19}], None, ["Rome"], "Rome", False),
        ({"text": "Rome", "answer_start": 19}, None, ["Rome"], "Rome", False),
        ("wet", None, ["wet"], "wet", False),
        ("Rome", None, ["Rome"], "Rome", True),
        ("Rome", "19", ["Rome"], "Rome", False),  # as csv gives it
        ("Rome", "", ["Rome"], "Rome", True),
        (["Roma", "wet"], None, ["Roma", "wet"], "wet", False),  # the first that is in the context
        ({"text": [" rained "], "answer_start": [2]}, None, [" rained "], "rained", False),
        ({"text": [], "answer_start": []}, None, [], None, False),
        ({"text": [""], "answer_start": [-1]}, None, [], None, False),
        ([], None, [], None, False),
        (" ", "", [], None, False),
    ],
)
def test_a_shape_and_what_is_learned_of_it(
    value: Any, start: Any, texts: list[str], learned: str | None, guessed: bool
) -> None:
    answers = read_answers(value, start, CONTEXT)
    assert answers.texts == texts and answers.guessed == guessed
    assert (answers.span and CONTEXT[slice(*answers.span)]) == learned
    if start == "19" or (isinstance(value, dict) and value.get("answer_start") == 19):
        assert answers.span == (19, 23)


@pytest.mark.parametrize(
    ("value", "start", "problem"),
    [
        (None, None, "are missing"),
        ({"texts": ["wet"]}, None, "are missing"),
        (7, None, "are no text"),
        ({"text": ["wet"], "answer_start": [1, 2]}, None, "are 1 texts with 2 starts"),
        (
            {"text": ["wet"], "answer_start": [27]},
            None,
            "say 'wet' at character 27 of the context, but it stands at 28",
        ),
        ({"text": ["dry"], "answer_start": [28]}, None, "at character 28 of the context, where it is not"),
        ({"text": ["wet", "dry"], "answer_start": [28, 28]}, None, "say 'dry' at character 28"),
        ({"text": ["wet."], "answer_start": [-4]}, None, "at character -4"),
        ({"text": ["wet", ""], "answer_start": [28, 0]}, None, "an empty text beside others"),
        (["dry", "Roma"], None, "say 'dry', which is not in the context"),
        ("wet", "28.5", "start at '28.5'"),
        ("wet", "inf", "start at 'inf'"),
    ],
)
def test_what_cannot_be_learned_from(value: Any, start: Any, problem: str) -> None:
    with pytest.raises(BadRow, match=problem.replace(".", r"\.")):
        read_answers(value, start, CONTEXT)
