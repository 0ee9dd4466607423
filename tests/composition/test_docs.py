"""docs/methods.md is what the declarations say, and every method has its page."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(path.stem for path in (ROOT / "recipes" / "method").glob("*.yaml"))
FORMS_OF = {"dora_official": "dora", "dora_paper": "dora", "adalora_official": "adalora"}
SECTIONS = ["Idea", "Formula", "When to use it", "How to run it", "Budget", "What differs", "Saved as", "Citation"]


def test_the_matrix_in_the_docs_is_generated_from_the_parts_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "scripts" / "methods_doc.py"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [str(script), "--check"])
    assert runpy.run_path(str(script))["main"]() == 0, "run python scripts/methods_doc.py"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page_with_every_section(method: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{FORMS_OF.get(method, method)}.md").read_text(encoding="utf-8")
    wanted = SECTIONS[:-1] if method in ("full", "head") else SECTIONS  # nobody to cite
    missing = [name for name in wanted if not re.search(rf"^(\*\*|## ){name}", page, re.MULTILINE)]
    assert not missing
    assert f"method={method}" in page or method in FORMS_OF
    assert method in page


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
