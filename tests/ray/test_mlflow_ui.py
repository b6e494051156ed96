"""What a stranger sees of a sweep on MLflow's pages, in a real browser.

Needs Debian's chromium and Playwright's Python package (which brings none of its own browsers here).
SWEEP=folder looks at that finished sweep, in its sqlite store, instead of a tiny one; SCREENSHOTS=folder keeps the
pictures (make screenshots does both).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.mlflow_server import environment, serve_mlflow
from tests.ray.conftest import ROOT, TINY, run
from tests.ray.sweeps import SHORT, sweep_command

CHROMIUM = shutil.which("chromium")
pytestmark = [
    *(pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
expect = playwright.expect
AXES = ("layer_decay", "drop_path", "final/top1")
TRAINING = "workflowType=machine_learning"


@dataclass(frozen=True)
class Store:
    server: str
    folder: Path
    """Of the sweep."""
    parent: Any
    trials: list[Any]
    """With the reference, which has no rank."""
    pretraining: Any

    @property
    def points(self) -> list[tuple[float, ...]]:
        """Where the trials are on the axes."""
        return sorted(
            (*(float(trial.data.params[name]) for name in AXES[:2]), trial.data.metrics[AXES[2]])
            for trial in self.trials
        )


def run_id_of(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["mlflow"]["run_id"]


@pytest.fixture(scope="module")
def store(request, tmp_path_factory) -> Iterator[Store]:
    """A pretraining run and a sweep that starts from it."""
    from mlflow import MlflowClient

    base = tmp_path_factory.mktemp("ui")
    with contextlib.ExitStack() as stack:
        if "SWEEP" in os.environ:
            folder = Path(os.environ["SWEEP"]).resolve()
            uri = json.loads((folder / "run.json").read_text())["mlflow"]["uri"]
            server = stack.enter_context(serve_mlflow(uri, base))
        else:
            folder, server = base / "sweep", request.getfixturevalue("mlflow_server")
            photos = request.getfixturevalue("photos")
            common = ["--data", str(photos), "--mlflow-uri", server, "--loop.max-broken-fraction", "0.2"]
            done = run("demo", "--output", base / "pretrained", *TINY, *common, cwd=base)
            assert done.returncode == 0, done.stdout + done.stderr
            program = sweep_command(*SHORT, *common, "--pretrained", base / "pretrained", "--output", folder)
            swept = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
            assert swept.returncode == 0, swept.stdout + swept.stderr
        client = MlflowClient(tracking_uri=server)
        parent = client.get_run(run_id_of(folder))
        trials = [client.get_run(run_id_of(place)) for place in folder.glob("trials/*")]
        assert len(trials) >= 4
        yield Store(server, folder, parent, trials, client.get_run(parent.data.tags["pretrained.run_id"]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # for root
        yield browser
        browser.close()


@pytest.fixture
def page(browser, store) -> Iterator[Any]:
    """A page of a visitor who has never been there; nothing but our server answers it."""
    with browser.new_context(viewport={"width": 1400, "height": 800}) as context:
        context.set_default_timeout(90_000)
        expect.set_options(timeout=90_000)
        context.route(re.compile(f"^https?://(?!{re.escape(store.server[7:])})"), lambda route: route.abort())
        # The page's assistant opens by itself on the first visit and takes a quarter of it.
        context.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
        yield context.new_page()


@pytest.fixture
def keep(store, tmp_path):
    """Keeps a picture of a page, without the place where this machine has its runs."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path)).resolve()
    shorten = """place => {
        const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replaceAll(place, '/runs');
    }"""

    def keep(page: Any, name: str) -> None:
        page.evaluate(shorten, str(store.folder.parent))
        picture = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
        picture.convert("RGB").quantize(256).save(folder / f"mlflow_{name}.png", optimize=True)  # for a small file

    return keep


def link_of(entity: Any) -> str:
    return f"#/experiments/{entity.info.experiment_id}/runs/{entity.info.run_id}?{TRAINING}"


def follow(page: Any, link: Any) -> Any:
    """Click on a link of a description.   Returns: the page that it opens beside this one."""
    with page.context.expect_page() as opened:
        link.click()
    return opened.value


def row(page: Any, entity: Any) -> Any:
    """The part of a run's row in the table that has its name."""
    name = page.get_by_role("link", name=entity.info.run_name, exact=True)
    return page.locator(f'[role="row"][row-id="{entity.info.run_id}"]').filter(has=name)


def cell(page: Any, index: int, column: str) -> Any:
    """A cell of the table, by the index of its row and MLflow's key of its column."""
    return page.locator(f'[role="row"][row-index="{index}"] [role="gridcell"][col-id="{column}"]')


def test_the_best_trial_is_found_in_three_clicks(page, store, keep):
    """From MLflow's first page: the side for training, the experiment, the sweep, which says what is best."""
    ranked = sorted(
        (trial for trial in store.trials if "rank" in trial.data.tags), key=lambda trial: int(trial.data.tags["rank"])
    )
    best = max(trial.data.metrics["final/top1"] for trial in ranked)
    (reference,) = (trial for trial in store.trials if trial not in ranked)
    page.goto(f"{store.server}/#/experiments")
    page.get_by_text("Model training", exact=True).click()
    page.get_by_role("link", name="mixmae-sweep").click()
    row(page, store.parent).get_by_role("link", name=store.parent.info.run_name).click()
    sentence = page.get_by_text("Best: ")
    scratch = reference.data.metrics["final/top1"]
    expect(sentence).to_contain_text(f"final/top1 {best:.2%}, from scratch {scratch:.2%}")
    winner, *others = ranked
    for trial in others:  # the page gets their names last
        expect(page.get_by_role("link", name=trial.info.run_name, exact=True)).to_be_visible()
    keep(page, "sweep")
    page = follow(page, sentence.get_by_role("link"))
    expect(page.get_by_role("heading", name=winner.info.run_name, exact=True)).to_be_visible()
    assert winner.info.run_id in page.url
    assert winner.data.metrics["final/top1"] == best
    assert winner.info.run_id == store.parent.data.tags["best.run_id"]


def test_trials_are_grouped_under_their_sweep(page, store, keep):
    page.goto(f"{store.server}/#/experiments/{store.parent.info.experiment_id}/runs?{TRAINING}")
    parent, trials = row(page, store.parent), [row(page, trial) for trial in store.trials]
    expect(parent).to_be_visible()
    for trial in trials:
        expect(trial).to_have_count(0)
    for _ in range(2):
        parent.get_by_role("button").click()
        for trial, seen in zip(trials, store.trials, strict=True):
            expect(trial.get_by_role("link", name=seen.info.run_name, exact=True)).to_be_visible()
            assert trial.get_by_role("link").bounding_box()["x"] > parent.get_by_role("link").bounding_box()["x"]
        tops = sorted([trial.bounding_box()["y"] for trial in trials])
        height = parent.bounding_box()["height"]
        assert tops == [parent.bounding_box()["y"] + height * place for place in range(1, len(trials) + 1)]
        keep(page, "runs")
        parent.get_by_role("button").click()
        for trial in trials:
            expect(trial).to_have_count(0)


def test_the_ranked_view_puts_the_best_trial_on_top(page, store, keep):
    page.goto(f"{store.server}/{link_of(store.parent)}")
    page = follow(page, page.get_by_role("link", name="all trials, ranked"))
    column = "metrics.`final/top1`"
    expect(page.locator(f'[role="gridcell"][col-id="{column}"]')).to_have_count(len(store.trials))
    expect(page.locator(f'[role="columnheader"][col-id="{column}"]')).to_be_visible()
    by_id = {trial.info.run_id: trial for trial in store.trials}
    shown = []
    for index in range(len(store.trials)):
        trial = by_id[page.locator(f'[role="row"][row-index="{index}"]').first.get_attribute("row-id")]
        for column, value in (
            *((f"params.`{name}`", float(trial.data.params[name])) for name in AXES[:2]),
            ("metrics.`final/top1`", trial.data.metrics["final/top1"]),
        ):
            assert float(cell(page, index, column).inner_text()) == pytest.approx(value, rel=1e-3)
        shown.append(trial.data.metrics["final/top1"])
    assert shown == sorted(shown, reverse=True)
    keep(page, "ranked")


def test_the_view_of_parallel_coordinates_has_numeric_axes(page, store):
    page.goto(f"{store.server}/{link_of(store.parent)}")
    page = follow(page, page.get_by_role("link", name="parallel coordinates"))
    axes = page.locator(".parcoords .dimension")
    expect(axes).to_have_count(3)
    for axis, name, values in zip(axes.all(), AXES, zip(*store.points, strict=True), strict=True):
        expect(axis.locator(".label")).to_have_text(name)
        ticks = [float(text) for text in axis.locator(".tick text").all_text_contents()]
        assert min(values) - 1e-3 <= min(ticks) <= max(ticks) <= max(values) + 1e-3
    drawn = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(v => v > 0)"
    assert page.locator(".parcoords canvas.foreground").evaluate(drawn)


def test_the_comparison_shows_every_trial_on_numeric_axes(page, store, keep):
    runs = quote(json.dumps([trial.info.run_id for trial in store.trials]))
    experiments = quote(json.dumps([store.parent.info.experiment_id]))
    page.goto(f"{store.server}/#/compare-runs?runs={runs}&experiments={experiments}&{TRAINING}")
    page.get_by_role("button", name="Clear All").click()
    parameters, metrics = page.get_by_role("combobox").all()[:2]
    for box, names in ((parameters, AXES[:2]), (metrics, AXES[2:])):
        for name in names:
            box.click()
            box.fill(name)
            page.get_by_title(name, exact=True).last.click()
        page.keyboard.press("Escape")
    plot = page.locator(".js-plotly-plot")
    expect(plot.locator(".axis-title")).to_have_text(AXES)
    (data,) = plot.evaluate("plot => plot.data")
    assert data["type"] == "parcoords"
    for dimension, texts in zip(
        data["dimensions"],
        plot.evaluate(
            "p => [...p.querySelectorAll('.axis')].map(a => [...a.querySelectorAll('.tick')].map(t => t.textContent))"
        ),
        strict=True,
    ):
        assert "ticktext" not in dimension  # as categories have
        assert [float(text) for text in texts if text]
    points = sorted(zip(*(dimension["values"] for dimension in data["dimensions"]), strict=True))
    np.testing.assert_allclose(points, store.points, rtol=1e-6)
    box = plot.bounding_box()
    assert box["width"] > 400
    assert box["height"] > 300
    keep(page, "compare")


def test_the_heat_map_is_displayed(page, store, keep):
    page.goto(f"{store.server}/{link_of(store.parent)}")
    page = follow(page, page.get_by_role("link", name="heat map"))
    assert displayed(page) == (store.folder / "heat_map.png").read_bytes()
    keep(page, "heat_map")


def test_the_pretraining_shows_its_newest_panel(page, store, keep):
    """From the sweep: the run that its weights are from, and there the panel."""
    page.goto(f"{store.server}/{link_of(store.parent)}")
    page = follow(page, page.get_by_role("link", name="pretraining", exact=True))
    expect(page.get_by_role("heading", name=store.pretraining.info.run_name, exact=True)).to_be_visible()
    page = follow(page, page.get_by_role("link", name="newest reconstruction"))
    panels = Path(store.pretraining.data.tags["output"]) / "panels"
    assert displayed(page) == max(panels.iterdir()).read_bytes()
    keep(page, "panel")


def displayed(page: Any) -> bytes:
    """The file of the picture that an artifact's page shows."""
    picture = page.locator("img:visible").last
    shown = "picture => picture.complete && picture.naturalWidth > 0 && picture.getBoundingClientRect().width > 200"
    page.wait_for_function(shown, arg=picture.element_handle())
    get = "async picture => Array.from(new Uint8Array(await (await fetch(picture.src)).arrayBuffer()))"
    return bytes(picture.evaluate(get))
