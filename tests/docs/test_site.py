"""The site builds without a broken link, needs nothing from elsewhere, and its reference is what the code says."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_is_written_from_the_code_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "scripts" / "reference_doc.py"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [str(script), "--check"])
    assert runpy.run_path(str(script))["main"]() == 0, "run python scripts/reference_doc.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built strictly: a link, an anchor or a page of no menu that leads nowhere ends it."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "scripts" / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_every_page_is_there_and_loads_only_what_lies_beside_it(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == len(list((ROOT / "docs").rglob("*.md"))) + 1  # and 404.html
    loaded = 0
    for page in pages:
        html = page.read_text(encoding="utf-8")
        used = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"' >]+)", html)
        used += re.findall(
            r"<link\b[^>]*\brel=\"?(?:stylesheet|icon|preload|preconnect)\b[^>]*href=\"?([^\" >]+)", html
        )
        assert not [place for place in used if "//" in place], page
        if page.name != "404.html":  # whose paths begin at the server's root
            assert all((page.parent / place.partition("?")[0]).exists() for place in used), page
        loaded += len(used)
    assert loaded > 3 * len(pages)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_the_search_has_an_index_that_a_page_on_the_disk_can_read(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = {")
    assert "allocator.interval" in index
