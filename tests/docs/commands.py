"""The commands in the documentation, as they stand there."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHELLS = ("bash", "console", "")  # of a console, what follows "$ " is typed and the rest is printed
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """What stands between two fences. ``title`` is the file's name where the page gives one."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One line of a shell, continuations joined. ``output`` is what a console shows below it."""

    where: str
    text: str
    output: str = ""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def program(self) -> str:
        return self.text.split(maxsplit=1)[0]


def blocks(page: Path, root: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match[2].partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        line = text.count("\n", 0, match.start()) + 1
        name = str(page.relative_to(root))
        found.append(Block(name, line, language, title[1] if title else "", textwrap.dedent(match[3])))
    return found


def commands(block: Block) -> list[Command]:
    """What is typed into a shell, in order; a script with ``#!`` is one command. Empty for other languages."""
    if block.language not in SHELLS:
        return []
    if block.text.startswith("#!"):
        return [Command(block.where, block.text)]
    prompts = block.language != "bash"
    return [Command(block.where, text, output) for text, output in _typed(block.text, prompts=prompts)]


def _typed(text: str, *, prompts: bool) -> Iterator[tuple[str, str]]:
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    if not prompts:
        yield from ((line.strip(), "") for line in lines if line.strip() and not line.lstrip().startswith("#"))
        return
    starts = [i for i, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=False):
        yield lines[start][2:].strip(), "\n".join(lines[start + 1 : end]).strip()
