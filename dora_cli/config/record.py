"""``RUN/config.yaml``: a run's whole configuration, written as a recipe that repeats it."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from dora_cli.config.recipes import HEADER

TITLE = "# Every value of a run, as it was used."
# they speak of one start, not of what is trained
NOT_REPEATED = ("out", "resume", "overwrite", "dry_run", "push_to_hub", "hub")


def write(recipe: str, chosen: Mapping[str, str], values: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """The text of ``config.yaml``.

    Args:
        recipe: the recipe's name, kept in a comment.
        words: those of the command, kept in another, for people.
        chosen: group → choice for model, data, method and the five parts.
        values: the resolved configuration, nested.
    """
    body = {key: value for key, value in values.items() if key not in NOT_REPEATED}
    defaults = ["_self_", *({f"override /{group}": name} for group, name in chosen.items())]
    text = OmegaConf.to_yaml(OmegaConf.create(_literal({"defaults": defaults, **body})))
    comments = ["#   dora-train recipe=THIS_FILE out=NEW      repeats it", f"#   recipe: {recipe}"]
    once = ("resume", "overwrite", "dry_run", "push_to_hub", "hub.private")
    lasting = [word for word in words if _key(word) not in once]
    if words:
        comments.append("#   command: " + " ".join(shlex.join(["dora-train", *lasting]).split()))
    return "\n".join([HEADER, TITLE, *comments, text])


def recipe_of(text: str) -> str | None:
    """The recipe's name where ``text`` is such a file, else None."""
    if not text.startswith(f"{HEADER}\n{TITLE}\n"):
        return None
    match = re.search(r"^#   recipe: (.+)$", text, re.MULTILINE)
    return match[1].strip() if match else None


def words_of(text: str) -> list[str]:
    """The words of the command that such a file notes, without what speaks of one start; a flag with its value."""
    match = re.search(r"^#   command: dora-train (.*)$", text, re.MULTILINE)
    try:
        words = shlex.split(match[1].replace("--config-dir ", "--config-dir=")) if match else []
    except ValueError:  # somebody wrote into it
        return []
    return [word for word in words if "=" in word and _key(word) not in NOT_REPEATED]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _literal(value: Any) -> Any:
    """Resolved text may hold ``${``, which must not be taken for an interpolation when it is read again."""
    if isinstance(value, Mapping):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
