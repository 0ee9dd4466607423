"""The base model as files: found by name, its tensors listed without reading or building anything."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path
from typing import Any

from dora_cli.checkpoints.json_io import read_json, take
from dora_cli.checkpoints.safetensors_io import FLOATS, Entry, read_header
from dora_cli.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# what a folder needs beside weights and config to be used: tokenizers, processors, generation, code of its own
SMALL_FILES = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "vocab.bpe", "merges.txt", "bpe.codes", "*.spm", "spiece.model", "*.bpe.model", "source.spm", "target.spm",
    "*.tiktoken", "chat_template.json", "*.jinja", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "*.py",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A base model's folder: its configuration, and where each tensor of its checkpoint lies."""

    folder: Path
    config: dict[str, Any]
    entries: Mapping[str, Entry]

    @property
    def dtype(self) -> str | None:
        """The floating-point type that most of its bytes have."""
        sizes: dict[str, int] = {}
        for entry in self.entries.values():
            if entry.dtype in FLOATS:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        return max(sizes, key=sizes.__getitem__) if sizes else None


def resolve_base(name: str, revision: str | None = None) -> Path:
    """The folder of a base model: a local folder, ``package://NAME/SUBFOLDER``, or a name on the hub.

    Files of a hub name come from the cache, or over the network where the hub may be reached (``HF_HUB_OFFLINE``).

    Raises:
        UserError: there is nothing under this name.
    """
    if name.startswith("package://"):
        return _package_folder(name)
    folder = Path(expanduser(name))
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no base model {name}", hint="name the folder that holds its config.json with base=")
    return _hub_folder(name, revision)


def _package_folder(name: str) -> Path:
    package, _, inner = name.removeprefix("package://").partition("/")
    try:
        spec = find_spec(package) if package.isidentifier() else None
    except ImportError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name}: the Python package '{package}' is not installed", hint="install it, or set base=")
    root = Path(spec.submodule_search_locations[0]).resolve()
    folder = (root / inner).resolve()
    if not folder.is_dir() or not folder.is_relative_to(root):
        raise UserError(f"{name}: the package has no folder '{inner}'", where=f"looked in {root}")
    return folder


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", INDEX, CONFIG, *SMALL_FILES]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"the base model {name} is neither a folder here nor to be had from the hub",
            where=str(error).strip().splitlines()[0],
            hint="name its folder with base=",
        ) from None


def open_base(folder: Path) -> Base:
    """List the tensors of a base model from the headers of its safetensors files.

    Raises:
        UserError: config or weights are missing, damaged, quantised, or pickled.
    """
    config = read_json(folder / CONFIG)
    if config.get("quantization_config"):
        raise UserError(
            f"{folder} holds quantised weights, to which nothing can be added", hint="name the original with base="
        )
    if (folder / SINGLE).is_file():
        return Base(folder, config, read_header(folder / SINGLE))
    if (folder / INDEX).is_file():
        return Base(folder, config, _sharded(folder))
    if any(next(folder.glob(pattern), None) for pattern in PICKLED):
        raise UserError(
            f"{folder} holds pickled weights only, which can run any code and are not read",
            hint="load it once with transformers and save it again: save_pretrained writes safetensors",
        )
    raise UserError(f"{folder} holds no weights", where=f"neither {SINGLE} nor {INDEX} is there")


def _sharded(folder: Path) -> dict[str, Entry]:
    """All tensors in the order of the shards, and within each in the order of the bytes."""
    index = folder / INDEX
    places = take(read_json(index), "weight_map", dict, index)
    for name, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index} is damaged", where=f"'{name}' should lie in a file of this folder, not {shard!r}")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(places.values())):
        entries |= {name: entry for name, entry in read_header(folder / shard).items() if places.get(name) == shard}
    if missing := next((name for name in places if name not in entries), None):
        raise UserError(f"{folder / places[missing]} is damaged", where=f"it has no '{missing}', its index says so")
    return entries


def copy_small_files(folder: Path, out: Path) -> None:
    """Copy tokenizer, processor and generation files, replacing those already in ``out``."""
    for pattern in SMALL_FILES:
        for file in folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
