"""YAML that is valid, small, and without end."""

import itertools
from pathlib import Path


def test_aliases_that_stand_for_billions_are_refused_at_once(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    levels = [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghijkl")]
    (tmp_path / "bomb.yaml").write_text("\n".join(["a: &a [x]", *levels]))
    (tmp_path / "circle.yaml").write_text("seed: &a [*a]\n")
    for name in ("bomb", "circle"):
        assert "more than 100,000 values" in refusal(f"recipe={name}.yaml").message


def test_defaults_that_lead_back_to_themselves_are_refused(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("self.yaml").write_text("defaults:\n  - self\n")
    Path("circle.yaml").write_text("# @package _global_\ndefaults:\n  - /recipe/circle\n  - _self_\n")
    for name in ("self", "circle"):
        error = refusal(f"recipe={name}.yaml")
        assert "lead back to themselves" in error.message
        assert f"{name}.yaml, line" in error.where
