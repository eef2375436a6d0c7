"""The report's page: what it holds, and how it behaves in a browser."""

import html
import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from experiments.captures import tiny_capture
from experiments.words import Words
from integrations import tiny_models
from louver.cli import app
from louver.errors import InputFileError
from louver.experiments import coverage, precision, profile, pruning
from louver.experiments.catalog import experiments
from louver.experiments.report import PROFILE, build, build_one
from louver.experiments.rows import machine, read_rows, write_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of three experiments, one of them in two files, and something else."""
    path = tmp_path_factory.mktemp("rows")
    capture, text = path / "tiny.safetensors", path / "text.txt"
    tiny_capture().save(capture)
    text.write_text("the quick brown </script> fox jumps over the lazy dog " * 4)
    loaded = (tiny_models.llama(), Words())
    runs = {
        "pruning": pruning.run(pruning.Config(capture=capture, subspaces=(8,), codec=("sketch",), metric=("frame",))),
        "pruning_more": pruning.run(pruning.Config(capture=capture, index=("ball",), subspaces=(1,), rule=("sum",))),
        "precision": precision.run(precision.Config(capture=capture, policies=("exact:0.01", "fp8", "drop:0.1"))),
        "coverage": coverage.run(coverage.Config(prompt_file=text, tokens=150, max_new_tokens=8), loaded=loaded),
    }
    for name, (rows, more) in runs.items():
        write_rows(path / f"{name}.json", rows, seed=0, command=f"louver experiment {name} <with> options", **more)
    (path / "other.json").write_text("[]")
    return path


@pytest.fixture(scope="module")
def page_file(folder):
    done = CliRunner().invoke(app, ["report", str(folder), "--out", str(folder / "report.html")])
    assert done.exit_code == 0, done.output
    return folder / "report.html"


def test_every_figure_of_the_tables_is_a_row(folder, page_file):
    page = page_file.read_text()
    for name in ("pruning", "pruning_more", "precision", "coverage"):
        document = read_rows(folder / f"{name}.json")
        described = experiments()[name.split("_")[0]]
        for line in described.cells(document["rows"]):
            assert all(f">{html.escape(cell)}</td>" in page for cell in line)
        assert html.escape(described.finding(document["rows"])) in page
        assert html.escape(document["machine"]["command"]) in page and f"rows in {name}.json" in page
    assert page.count("<section id=") == 5  # player and summary beside the three experiments


def test_the_page_needs_no_network(page_file):
    page = page_file.read_text()
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page) and "@import" not in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data and len(json.loads(data[1])["recording"]["steps"]) == 8


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(InputFileError, match="no such folder"):
        build(tmp_path / "nothing")
    with pytest.raises(InputFileError, match="no experiment's rows"):
        build(tmp_path)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which .ci/run installs")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(page_file, tmp_path, scheme):
    from playwright.sync_api import sync_playwright

    said = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        page.goto(page_file.as_uri())
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(20, 24, 29)") == (scheme == "dark")

        assert page.locator(".chart svg").count() == page.locator(".chart").count() >= 5
        dots = page.locator("#precision .point")
        assert dots.count() == 3
        dots.first.hover()
        assert "policy: exact:0.01" in page.locator("#tip").inner_text()

        before = page.locator("#written").inner_text(), page.locator("#text .hit").count()
        page.locator("#step").fill("5")
        assert page.locator("#where").inner_text() == "step 6 of 8"
        assert page.locator("#written").inner_text() != before[0] and before[1] > 0
        page.locator("#layers .layer").nth(1).click()
        assert page.locator("#layers .layer").nth(1).get_attribute("aria-checked") == "true"
        page.locator("#step").press("ArrowRight")
        assert page.locator("#where").inner_text() == "step 7 of 8"

        page.locator("#theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert not said


@pytest.fixture(scope="module")
def profile_page(tmp_path_factory):
    """The page that `louver profile` writes for a tiny model."""
    path = tmp_path_factory.mktemp("profile")
    text = path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 8)
    config = profile.Config(prompt_file=text, num_queries=64, policies=("exact:0.01", "exact:0.03"))
    found = profile.run(config, loaded=(tiny_models.llama(), Words()))
    document = {"machine": machine(0), **vars(found)}
    (path / "profile.html").write_text(build_one(PROFILE, "profile.json", document))
    return path / "profile.html", found


def test_the_profiles_page_shows_its_rows(profile_page):
    page, found = profile_page[0].read_text(), profile_page[1]
    for line in PROFILE.cells(found.rows):
        assert all(f">{html.escape(cell)}</td>" in page for cell in line)
    assert "The paper." not in page and not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert f"error {found.rows_by_length[0]['step_ms_error']:+.0%}" in page


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which .ci/run installs")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_profile_in_a_browser(profile_page, scheme):
    from playwright.sync_api import sync_playwright

    said = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        page.goto(profile_page[0].as_uri())
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(20, 24, 29)") == (scheme == "dark")
        assert page.locator(".chart svg").count() == page.locator(".chart").count() == 4
        page.locator(".point").first.hover()
        assert "step_ms" in page.locator("#tip").inner_text()
        page.locator("#theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert not said
