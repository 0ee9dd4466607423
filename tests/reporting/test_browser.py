"""The pages in a real browser: its slider, three widths, the dark, and paper. Skipped where there is none."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dora_cli.reporting.report import write_report
from dora_cli.reporting.runs import read_run

pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    """The page, drawn by the first test that looks at it."""
    return {}


@pytest.fixture
def page(browser: Any, drawn: dict[str, str], make_run: Callable[..., Path]) -> Any:
    """A run's page, open; nothing may be complained of in the browser's console, nor fetched."""
    folder = make_run()
    path = folder / "report.html"
    if not drawn:
        write_report(read_run(folder), path)
        drawn["html"] = path.read_text(encoding="utf-8")
    path.write_text(drawn["html"], encoding="utf-8")
    browser.get(f"file://{path}")
    return browser


def shown_ranks(page: Any) -> list[int]:
    script = "return [...document.querySelectorAll('[data-module]')].map(cell => Number(cell.textContent))"
    return list(page.execute_script(script))


def move(page: Any, index: int) -> None:
    page.execute_script(
        "const s = document.getElementById('step'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", index
    )


def test_the_slider_shows_each_event(page: Any, tmp_path: Path) -> None:
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = [event for event in events if event["split"] == "allocation"]
    assert sum(shown_ranks(page)) == 9, "at first the end"
    for index, event in enumerate(events):
        move(page, index)
        assert shown_ranks(page) == list(event["ranks"].values())
        assert page.find_element("id", "frame").text.startswith(f"step {event['step']}: {event['alive']} alive")
        totals = page.execute_script("return [...document.querySelectorAll('.total')].map(c => Number(c.textContent))")
        assert sum(totals) == event["alive"]
    page.find_element("id", "play").click()
    assert page.find_element("id", "play").text == "Stop"
    page.find_element("id", "play").click()


@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_runs_over_the_edge(page: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        visible = (
            "return [...document.querySelectorAll('svg')].filter(s => s.checkVisibility()).map(s => s.classList[0])"
        )
        assert set(page.execute_script(visible)) == {"narrow" if width <= 600 else "wide"}
        least = "return Math.min(...[...document.querySelectorAll('svg text')].filter(t => t.checkVisibility())"
        assert page.execute_script(least + ".map(t => t.getBoundingClientRect().height))") >= 9, "letters can be read"
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width", [360, 1280])
def test_a_comparison_does_not_run_over_the_edge_either(
    browser: Any, make_run: Callable[..., Path], tmp_path: Path, width: int
) -> None:
    from dora_cli.cli.report import main

    for method, seed in (("dora", 1), ("dora", 2), ("lora", 1), ("lora", 2)):
        make_run(f"runs/{method}{seed}", method=method, seed=seed, value=0.8 + seed / 100)
    assert main([f"runs={tmp_path}/runs/*", f"out={tmp_path}/page"]) == 0
    browser.get(f"file://{tmp_path}/page/index.html")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert len(browser.find_elements("css selector", "table.ranks")) == 2
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def luminance(colour: str) -> float:
    """Relative luminance, as the contrast rules have it."""
    parts = [float(x) for x in re.findall(r"[\d.]+", colour)[:3]]
    r, g, b = (c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_the_light_and_in_the_dark(page: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})
    ground = luminance(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (ground > 0.5) == (scheme == "light")
    inks = page.execute_script(
        "return [...document.querySelectorAll('p, h1, figcaption, svg.wide text')]"
        ".map(e => e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color)"
    )
    assert len(inks) > 30
    for ink in set(inks):
        dark, light = sorted((luminance(ink), ground))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, ink


def test_paper_gets_the_wide_drawings_and_no_slider(page: Any) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    assert not page.find_element("id", "step").is_displayed()
    assert page.execute_script("return document.querySelector('svg.wide').checkVisibility()")
    pdf = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    assert len(pdf) > 10_000
