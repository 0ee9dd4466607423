"""What ``model.name`` means: a folder, a folder inside an installed package, or a name on the hub."""

import json
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path

from dora_cli.errors import UserError

PACKAGE = "package://"
PLACES = "model.name takes a hub name, a local folder, or package://NAME/SUBFOLDER"


def resolve_name(name: str, *, weights: bool = True) -> str:
    """The hub name, or the absolute folder that ``name`` means, checked to hold a model with safetensors weights.

    Args:
        name: a local folder, ``package://NAME/SUBFOLDER`` (found without importing the package), or a hub name. What
            exists as a folder is that folder.
        weights: whether a folder has to hold any; where it holds some, they are looked at all the same.

    Raises:
        UserError: no such folder or package; a folder without ``config.json`` or without safetensors weights.
    """
    if not name.strip():
        raise UserError("model.name is empty", hint=PLACES)
    if name.startswith(PACKAGE):
        return str(_checked_folder(_package_folder(name), name, weights))
    folder = Path(expanduser(name))
    if folder.is_dir():
        return str(_checked_folder(folder.resolve(), name, weights))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model.name={name}: no such folder", where=f"looked for {folder.absolute()}", hint=PLACES)
    return name


def _package_folder(name: str) -> Path:
    package, _, sub = name.removeprefix(PACKAGE).partition("/")
    try:
        spec = find_spec(package) if package.isidentifier() else None  # a dotted name would import its parent
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.name={name}: there is no installed package '{package}'",
            hint=f"install it into this environment (pip install {package.replace('_', '-')}), or correct the name",
        )
    for root in (Path(place).resolve() for place in spec.submodule_search_locations):
        folder = (root / sub).resolve()
        if folder.is_dir() and folder.is_relative_to(root):
            return folder
    there = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("_"))
    raise UserError(
        f"model.name={name}: package '{package}' has no folder '{sub}'",
        where=f"in {root}",
        hint=f"its folders: {', '.join(there) or 'none'}",
    )


def _checked_folder(folder: Path, name: str, weights: bool) -> Path:
    if not (folder / "config.json").is_file():
        hint = PLACES
        if (folder / "adapter_config.json").is_file():
            hint = "it holds an adapter: give its base model here, or merge the two first with dora-merge"
        elif (folder / "adapter").is_dir():
            hint = "it looks like a run folder: give its base model here, or the folder that dora-merge writes from it"
        raise UserError(
            f"model.name={name}: the folder has no config.json, so it is no model", where=f"in {folder}", hint=hint
        )
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return folder
    if index.is_file():
        _check_index(index, name)
        return folder
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if not weights and not pickled:
        return folder
    only = f", only pickled ones ({', '.join(pickled[:3])}), which can run code when read" if pickled else ""
    raise UserError(
        f"model.name={name}: the folder has no safetensors weights{only}",
        where=f"in {folder}",
        hint="it must hold model.safetensors, or model.safetensors.index.json with its shards, "
        "as save_pretrained() of transformers writes them",
    )


def _check_index(index: Path, name: str) -> None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.name={name}: {index.name} is damaged", where=f"in {index.parent}") from error
    bad = sorted(str(s) for s in shards if Path(str(s)).name != s or not (index.parent / s).is_file())
    if bad:
        raise UserError(
            f"model.name={name}: {len(bad)} of {len(shards)} shards are missing, e.g. {bad[0]}",
            where=f"in {index.parent}, named by {index.name}",
        )
