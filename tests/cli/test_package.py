"""The build settings: every package is listed, and recipes travel with the wheel."""

import tomllib
from pathlib import Path

from dora_cli.config import recipes

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed():
    found = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in ROOT.glob("dora_cli/**/__init__.py")}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == found | {"dora_cli.recipes"}
    assert (ROOT / "recipes" / "__init__.py").is_file()


def test_entry_points_name_mains():
    for target in SETTINGS["project"]["scripts"].values():
        module, function = target.split(":")
        assert function == "main"
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


def test_recipes_are_found_in_a_checkout_and_inside_a_package(tmp_path, monkeypatch):
    assert recipes.recipes_dir() == ROOT / "recipes"
    installed = tmp_path / "dora_cli" / "config" / "recipes.py"
    (tmp_path / "dora_cli" / "recipes").mkdir(parents=True)
    monkeypatch.setattr(recipes, "__file__", str(installed))
    assert recipes.recipes_dir() == tmp_path / "dora_cli" / "recipes"
