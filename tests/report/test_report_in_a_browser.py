"""The report in headless Chromium: phone width, keyboard, sorting, and axe's rules for screen readers.

FASTUFT_CHROMIUM is a Chromium to use instead of playwright's.
"""

from __future__ import annotations

import json
import os

import pytest
from test_report_pages import write_run

from fastuft.report import write_report

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def change(file, values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def report(tmp_path):
    """A page with every part: two finetunings with verdicts and looks, and the run that they started from."""
    runs = []
    for name, accuracy in (("naive", 0.5), ("ours", 0.75), ("start", 0.25)):
        folder = write_run(tmp_path / name, retrieval=accuracy)
        if name != "start":
            change(folder / "summary.json", {"init": {"path": "start"}, "verdict": {"line": "Without labels: better."}})
            change(folder / "eval.json", {"before": {"retrieval": 0.25}})
            with (folder / "metrics.jsonl").open("a") as file:
                for step in (0, 20):
                    file.write(json.dumps({"kind": "look", "step": step, "effective_rank": 10.0 + step}) + "\n")
        runs.append((name, folder))
    write_report(tmp_path / "report.html", runs)
    return tmp_path / "report.html"


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        executable = os.environ.get("FASTUFT_CHROMIUM")
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, report):
    page = browser.new_page(viewport={"width": 360, "height": 740})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(report.as_uri())
    yield page
    assert errors == []


def first_column(page):
    return page.locator("table").first.locator("tbody tr td:first-child").all_inner_texts()


def test_nothing_is_wider_than_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_headings_sort_by_click_and_by_keyboard(page):
    assert first_column(page) == ["naive", "ours", "start"]
    heading = page.get_by_role("button", name="retrieval")
    heading.click()
    assert first_column(page) == ["start", "naive", "ours"]
    heading.focus()
    page.keyboard.press("Enter")
    assert first_column(page) == ["ours", "naive", "start"]
    assert page.locator("th[aria-sort=descending]").count() == 1


def test_axe_finds_no_violation(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    assert axe.run(page).response["violations"] == []
