"""The rooms: imports flow one way, adapters and allocation need torch alone, nothing is unpickled, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dora_cli

PACKAGE = Path(dora_cli.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A room may import those of lower levels and its own; rooms of one level never each other.
LEVEL = {
    "callback": 6,  # of transformers' Trainer
    **dict.fromkeys(("train", "api"), 5),  # ``python -m dora_cli.train``; the Python API
    "cli": 4,
    **dict.fromkeys(("training", "checkpoints", "evaluation", "reporting", "api_checks"), 3),
    "allocation": 2,
    **dict.fromkeys(("adapters", "config", "models", "data"), 1),
    **dict.fromkeys(("registry", "modes", "processes"), 0),
    "errors": -1,
}


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_downwards(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "dora_cli" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        there = parts[1]
        assert there == here or LEVEL[there] < LEVEL[here], f"{here} imports {there}: {name}"


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in ("adapters", "allocation")], ids=lambda p: p.stem)
def test_adapters_and_allocation_need_torch_alone(path: Path) -> None:
    allowed = {"torch", "dora_cli", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


def test_command_and_configuration_rooms_do_not_load_torch_to_be_imported() -> None:
    heavy = {"torch", "transformers", "datasets"}
    light = [p for p in FILES if room(p) == "config" or (p.parent.name == "cli" and not p.stem.endswith("_run"))]
    assert len(light) > 8
    for path in light:
        assert not {n.split(".")[0] for n in imports(path, top_level=True)} & heavy, path


def test_nothing_is_unpickled_or_evaluated() -> None:
    for path in FILES:
        names = imports(path)
        # cli/launchers.py starts threads by joblib, which then pickles nothing.
        pickling = {"pickle", "dill", "shelve", "marshal"} | ({"joblib"} if path.stem != "launchers" else set())
        assert not {n.split(".")[0] for n in names} & pickling, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec", "yaml.load", "os.system"), path


def test_files_stay_small() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_parts_can_be_listed_without_torch() -> None:
    code = "import sys, dora_cli.adapters, dora_cli.allocation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
