"""The page in a real browser: no error, the log's points, videos that play, and input that stays text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from PIL import Image
from report_runs import MARKUP, entry, serving, validation, write_run, write_sample

from wan_train.report.page import write_page

pytestmark = pytest.mark.skipif(chromium.PATH is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    """One for all tests here."""
    with chromium.Page(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def losses_drawn(page: chromium.Page) -> list[list[Any]]:
    """The points of the first curve of the first chart, as plotly has them."""
    found: list[list[Any]] = json.loads(
        page.evaluate("(({x, y}) => JSON.stringify([[...x], [...y]]))(document.querySelector('.chart').data[0])")
    )
    return found


def choose(page: chromium.Page, name: str, value: str) -> None:
    """As somebody who chooses an option of the page."""
    place = f"document.getElementById('{name}')"
    page.evaluate(f"{place}.value = '{value}'; {place}.dispatchEvent(new Event('change'))")


def test_it_opens_without_an_error_and_draws_the_log(browser: chromium.Page, tmp_path: Path) -> None:
    losses = [5 - step / 20 for step in range(1, 61)]
    log: list[Any] = [entry(step, loss) for step, loss in enumerate(losses, 1)]
    log[30:30] = [{"event": "resumed", "step": 30}]
    log += [validation(60, {"500": 2.5, "900": 1.5})]
    one = write_run(tmp_path / "one", log, {"optimizer": {"lr": 0.1}}, saved=60)
    two = write_run(tmp_path / "two", log[:20], {"optimizer": {"lr": 0.2}}, saved=20)
    path = write_page([one, two], tmp_path / "page.html")
    browser.open(path.as_uri())
    assert browser.problems == []
    assert browser.requested == [path.as_uri()], "it has asked for something else"
    assert losses_drawn(browser) == [list(range(1, 61)), losses]
    names = browser.evaluate("[...document.querySelector('.chart').data].map((trace) => trace.name)")
    assert names == ["one", "one, smoothed", "two", "two, smoothed"]
    titles = browser.evaluate("[...document.querySelectorAll('.chart .gtitle')].map((title) => title.textContent)")
    assert titles[:3] == ["Loss", "Validation loss by timestep", "Gradient norm"]
    assert len(titles) == 11
    assert browser.evaluate("document.getElementById('absent').textContent") == "Not in the log: Caption gap."
    rows = "[...document.querySelectorAll('#differences tr')].map((row) => row.innerText.split('\\t').join(' ').trim())"
    assert browser.evaluate(rows) == ["key one two", "optimizer.lr 0.1 0.2"]
    marks = "document.querySelector('.chart').layout.shapes.map((shape) => shape.x0)"
    assert sorted(browser.evaluate(marks)) == [20, 30, 60], "two saves and the resume"
    rates = "document.querySelectorAll('.chart')[3].layout.yaxis.range"
    assert browser.evaluate(rates) == [0, 0.002], "a constant rate of 0.001"
    # The other axis: 100 tokens and 2 seconds each step.
    choose(browser, "axis", "tokens")
    assert losses_drawn(browser)[0] == [100 * step for step in range(1, 61)]
    choose(browser, "axis", "hours")
    np.testing.assert_allclose(losses_drawn(browser)[0], np.arange(1, 61) / 1800, rtol=1e-12)
    choose(browser, "smoothing", "")
    assert browser.evaluate("document.querySelector('.chart').data.length") == 2
    browser.screenshot(tmp_path / "shot.png")
    shown = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).reshape(-1, 3)
    blue, red = np.array([0x1F, 0x77, 0xB4]), np.array([0xD6, 0x27, 0x28])
    assert all((np.abs(shown.astype(int) - hue).max(axis=1) < 40).sum() > 500 for hue in (blue, red)), "no curves"
    assert browser.problems == []


def test_videos_play(browser: chromium.Page, tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)])
    for step in (100, 200):
        write_sample(tmp_path, step, "fox", "a fox in the snow")
    browser.open(write_page([tmp_path]).as_uri())
    if not browser.evaluate("document.createElement('video').canPlayType('video/mp4; codecs=\"avc1.42E01E\"')"):
        pytest.skip("this browser has no H.264")
    assert browser.evaluate("document.querySelectorAll('video').length") == 2
    browser.evaluate("document.getElementById('play').click()")
    for number in (0, 1):
        browser.wait_for(f"document.querySelectorAll('video')[{number}].currentTime > 0.2")
    sizes = "[...document.querySelectorAll('video')].map((video) => [video.videoWidth, video.videoHeight])"
    assert browser.evaluate(sizes) == [[64, 48], [64, 48]]
    assert "a fox in the snow" in browser.evaluate("document.getElementById('videos').innerText")
    assert browser.problems == []


def test_a_single_frame_is_a_picture(browser: chromium.Page, tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)])
    write_sample(tmp_path, 100, "fox", MARKUP, frames=1)
    sizes = "[...document.querySelectorAll('#videos img')].map((image) => [image.naturalWidth, image.naturalHeight])"
    browser.open(write_page([tmp_path]).as_uri())
    browser.wait_for("document.querySelector('#videos img')?.complete")
    assert browser.evaluate(sizes) == [[64, 48]]
    assert browser.evaluate("document.querySelector('#videos img').alt") == MARKUP
    assert browser.evaluate("document.getElementById('play').hidden"), "there is nothing to play"
    with serving(tmp_path) as server:
        browser.open(server.url)
        browser.wait_for("document.querySelector('#videos img')?.complete")
        assert browser.evaluate(sizes) == [[64, 48]]
        write_sample(tmp_path, 200, "fox", MARKUP, frames=1)
        browser.wait_for("[...document.querySelectorAll('#videos img')].filter((image) => image.complete).length === 2")
        assert browser.evaluate(sizes) == [[64, 48], [64, 48]]
        assert browser.problems == []
        browser.open("about:blank")


def test_input_runs_nothing(browser: chromium.Page, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    timestep = "<a href='javascript:alert(1)'>5"
    log = [entry(1, **{MARKUP: 2.0}), validation(1, {timestep: 1.0}), {"event": MARKUP, "step": 1, "text": MARKUP}]
    write_run(folder, log, {"dataset": {"path": MARKUP}, MARKUP: 1}, saved=1)
    write_sample(folder, 1, "fox", MARKUP)
    page = write_page([folder], tmp_path / "page.html")
    # Escaping alone must hold, so the policy that would stop what runs is taken away.
    text = page.read_text(encoding="utf-8").replace("Content-Security-Policy", "X-Nothing")
    page.write_text(text, encoding="utf-8")
    browser.open(page.as_uri())
    assert browser.evaluate("document.title") == folder.name
    assert browser.evaluate("document.querySelectorAll('img, a[href*=javascript]').length") == 0
    shown = browser.evaluate("document.body.textContent")
    for place in ("#videos td.caption", "#settings", "#events"):
        assert MARKUP in browser.evaluate(f"document.querySelector('{place}').textContent"), place
    assert shown.count(MARKUP) >= 4
    titles = browser.evaluate("[...document.querySelectorAll('.chart .gtitle')].map((title) => title.textContent)")
    assert MARKUP in titles
    legends = browser.evaluate("[...document.querySelectorAll('.legendtext')].map((name) => name.textContent)")
    assert f"t = {timestep}" in legends
    assert browser.problems == []


def test_a_log_without_a_step_and_one_with_gaps_open(browser: chromium.Page, tmp_path: Path) -> None:
    empty = write_run(tmp_path / "empty", [])
    nan = json.dumps(entry(2)).replace('"loss": 1.0', '"loss": NaN')
    gap = write_run(tmp_path / "gap", [entry(1), nan, entry(3), json.dumps(entry(4))[:40]])
    browser.open(write_page([empty]).as_uri())
    assert browser.evaluate("document.querySelectorAll('.chart').length") == 0
    assert "The log has no step yet." in browser.evaluate("document.body.innerText")
    browser.open(write_page([gap, empty]).as_uri())
    assert losses_drawn(browser) == [[1, 2, 3], [1.0, None, 1.0]]
    assert browser.problems == []


def test_the_page_follows_the_run(browser: chromium.Page, tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)])
    write_sample(tmp_path, 1, "fox")
    with serving(tmp_path) as server:
        browser.open(server.url)
        assert losses_drawn(browser) == [[1], [1.0]]
        browser.evaluate("document.querySelector('video').before = true")
        with (tmp_path / "log.jsonl").open("a") as log:
            log.writelines(json.dumps(entry(step, 2.0)) + "\n" for step in (2, 3))
        browser.wait_for("document.querySelector('.chart').data[0].x.length === 3")
        assert losses_drawn(browser) == [[1, 2, 3], [1.0, 2.0, 2.0]]
        assert browser.evaluate("document.querySelector('video').before"), "a video that plays has been replaced"
        browser.wait_for("document.getElementById('state').textContent.startsWith('Following the run')")
        browser.wait_for("document.querySelector('video').readyState > 0")
        assert browser.problems == []
        browser.open("about:blank")
