"""Write docs/methods.md: every part, every method and what goes together, all from the parts' own declarations.

python scripts/methods_doc.py            writes the file
python scripts/methods_doc.py --check    exits 1 where the file is not what would be written
"""

import re
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

from dora_cli.adapters import ADAPTERS
from dora_cli.adapters.init import INITS
from dora_cli.allocation import ALLOCATORS, IMPORTANCES, REGULARIZERS, rules
from dora_cli.allocation.allocators.none import NoAllocator
from dora_cli.allocation.importance.none import NoImportance
from dora_cli.allocation.schedules import Constant
from dora_cli.config.recipes import sentence
from dora_cli.errors import UserError
from dora_cli.registry import PART_TABLES, load, part_table

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "methods.md"
BAR = "\\|"  # a bar inside a table's cell
QUESTIONS = {
    "adapter": "How is ΔW written down?",
    "importance": "What is a unit worth?",
    "schedule": "How much may live at step t?",
    "allocator": "Who lives, and what happens to the rest?",
    "regularizer": "What is added to the loss?",
}
MODES = {
    "shrink": "shrinks from the start rank to the budget",
    "grow": "grows from the start rank to the budget",
    "constant": "on budget throughout",
    "static": "the budget is spread evenly and stays",
}


def page() -> str:
    """The whole file."""
    return "\n".join(
        [
            "# Methods, and what goes together",
            "",
            "<!-- Written by scripts/methods_doc.py from the parts' declarations; a test holds it to them. -->",
            "",
            "A method is one answer to each of five questions. Change one by `GROUP=NAME` on the command line, for",
            "example `method=dora importance=sensitivity`, or write your own preset ([extending](extending.md)).",
            "",
            *methods(),
            *parts(),
            *starts(),
            *packed_bases(),
            *matrix(),
        ]
    )


def methods() -> list[str]:
    lines = ["## Methods", "", "| method | adapter | importance | schedule | allocator | regularizer | |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for file in sorted((ROOT / "recipes" / "method").glob("*.yaml")):
        chosen = {}
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]:
            chosen |= {key.split("/")[-1]: value for key, value in entry.items()} if isinstance(entry, dict) else {}
        cells = [chosen.get(group, "") for group in PART_TABLES]
        lines.append(f"| {_linked(file.stem)} | " + " | ".join(cells) + f" | {sentence(file).replace('|', BAR)} |")
    return [*lines, ""]


def parts() -> list[str]:
    lines = ["## Parts", ""]
    for group, question in QUESTIONS.items():
        lines += [
            f"### {group}: {question}",
            "",
            "| name | what it is | " + _facts_title(group) + " |",
            "| --- | --- | --- |",
        ]
        for name in part_table(group):
            part = load(part_table(group), name, key=group)
            lines.append(f"| `{name}` | {_summary(part)} | {_facts(group, part)} |")
        lines.append("")
    return lines


def starts() -> list[str]:
    lines = [
        "## Starts",
        "",
        "`adapter.init=NAME` sets where an adapter's factors start; `default` is its own way.",
        "",
    ]
    lines += ["| init | what it is | adapters |", "| --- | --- | --- |"]
    for name in INITS:
        init = load(INITS, name, key="adapter.init")
        adapters = {n: load(ADAPTERS, n, key="adapter") for n in ADAPTERS}
        able = [n for n, part in adapters.items() if hasattr(part, "start") and init.needs <= part.provides]
        lines.append(f"| `{name}` | {_summary(init)} | {', '.join(able)} |")
    return [*lines, ""]


def packed_bases() -> list[str]:
    """Which adapters rest on a base with packed weights, and why the others do not."""
    why = {name: load(ADAPTERS, name, key="adapter").no_packed_base for name in ADAPTERS}
    lines = ["## Quantised bases", "", "With `model.quantization=` ([quantised.md](quantised.md)) go the adapters"]
    lines += [", ".join(f"`{name}`" for name, reason in why.items() if not reason) + ".", "Refused are:", ""]
    return [*lines, *(f"- `{name}`: {reason}" for name, reason in why.items() if reason), ""]


def matrix() -> list[str]:
    """Per adapter a table importance × allocator; each refusal in the words of the command."""
    outcomes = {(n["adapter"], n["importance"], n["allocator"]): outcome for n, outcome in rules.combinations()}
    valid = sum(isinstance(outcome, str) for outcome in outcomes.values())
    lines = [
        "## What goes together",
        "",
        f"Of {len(outcomes):,} adapter × importance × allocator combinations {valid} are valid: exactly those in which",
        "each part finds what it needs. Dots are refusals; the command says each in the words below the table, before",
        "any model loads.",
        "",
    ]
    for adapter in ADAPTERS:
        lines += [f"### adapter={adapter}", "", "| importance | " + " | ".join(ALLOCATORS) + " |"]
        lines += ["| --- |" + " :-: |" * len(ALLOCATORS)]
        for importance in IMPORTANCES:
            row = [_cell(outcomes[adapter, importance, allocator]) for allocator in ALLOCATORS]
            if any(row):
                lines.append(f"| `{importance}` | " + " | ".join(cell or "·" for cell in row) + " |")
        able = [name for name in REGULARIZERS if _refusal_of_regularizer(adapter, name) is None]
        lines += ["", f"Regularizers: {', '.join(able)}.", ""]
        refusals = {_words(o) for (a, _, _), o in outcomes.items() if a == adapter and isinstance(o, UserError)}
        refusals |= {_words(e) for name in REGULARIZERS if (e := _refusal_of_regularizer(adapter, name))}
        lines += [
            "<details><summary>Refusals</summary>",
            "",
            *(f"- {text}" for text in sorted(refusals)),
            "",
            "</details>",
            "",
        ]
    return lines


def _refusal_of_regularizer(adapter: str, regularizer: str) -> UserError | None:
    names = {"adapter": adapter, "importance": "none", "schedule": "constant", "allocator": "none"}
    part = load(REGULARIZERS, regularizer, key="regularizer")
    try:
        chosen = load(ADAPTERS, adapter, key="adapter")
        rules.check(chosen, NoImportance, Constant, NoAllocator, part, {**names, "regularizer": regularizer})
    except UserError as error:
        return error
    return None


def _cell(outcome: str | UserError) -> str:
    return "✓" if isinstance(outcome, str) else ""


def _words(error: UserError) -> str:
    return f"{error.message}: {error.where}" if error.where else error.message


def _facts_title(group: str) -> str:
    return {"adapter": "units; saved as", "importance": "needs; scores", "schedule": "", "regularizer": "works on"}.get(
        group, "acts on; how it meets the budget"
    )


def _facts(group: str, part: type) -> str:
    if group == "adapter":
        units = " or ".join(u for u in part.units if u != "none") or "none"
        saved = part.export if isinstance(part.export, str) else "lora or square"
        return f"{units}; {saved}"
    if group == "schedule":
        return "moves" if part.moves else "does not move"
    units = _listed(part.units - {"none"})
    if group == "importance":
        return f"{_listed(part.needs) or 'nothing'}; {units}"
    return units if group == "regularizer" else f"{units}; {MODES[part.mode]}"


def _listed(words: frozenset[str]) -> str:
    return ", ".join(sorted(words))


def _linked(name: str) -> str:
    """The method's name, with a link to its page, or to the page of the method that it is a form of."""
    for stem in (name, *(name[:i] for i in range(len(name), 0, -1) if name[i : i + 1] == "_")):
        if (ROOT / "docs" / "methods" / f"{stem}.md").is_file():
            return f"[`{name}`](methods/{stem}.md)"
    return f"`{name}`"


def _summary(part: type) -> str:
    """What a part is, in a sentence: its module's first, or its own where several parts share a module."""
    module = sys.modules[part.__module__]
    places = [place.split(":")[0] for group in PART_TABLES for place in part_table(group).values()]
    text = (part.__doc__ if places.count(part.__module__) > 1 else module.__doc__) or ""
    shared = places.count(part.__module__) > 1
    first = " ".join(text.split()) if shared else text.strip().splitlines()[0]
    first = re.sub(r"\s*\((METHODS|DESIGN)[^)]*\)", "", first)
    return first.rstrip(".:").replace("``", "`").replace("|", BAR)


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return int(not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text)
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
