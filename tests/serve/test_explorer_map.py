"""The explorer's map, what it exports, and the page that it records: a real Chromium, on the served model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import httpx
import numpy as np
import pytest
from chromium import PLACE, A, B, latent_in, post, texts, tidy
from playwright.sync_api import Browser, Page, expect


def test_the_map_shows_the_validation_texts_and_each_place_has_its_text(visit: Callable, client: httpx.Client) -> None:
    page = visit().open("#map")
    found = client.get("/v1/map").json()
    points, centre, axes = found["points"], np.array(found["centre"]), np.array(found["axes"])
    expect(page.locator("#map .dot")).to_have_count(len(points))
    # At first in the middle.
    text = post(client, "/v1/decode", latent=[centre.tolist()])["choices"][0]["text"]
    expect(page.locator("#map .chosen")).to_have_text(tidy(text))
    plot, lonely = page.locator("#map svg"), loneliest(points)
    box, (x, y) = plot.bounding_box(), place_of(page, lonely)
    plot.hover(position={"x": x, "y": y})
    expect(page.locator("#map .tip")).to_have_text(tidy(points[lonely]["text"]))
    plot.click(position={"x": x, "y": y})
    expect(page.locator("#map .nearby")).to_contain_text(f"What the model makes of: {tidy(points[lonely]['text'])}")
    own = post(client, "/v1/reconstruct", input=[points[lonely]["text"]])["choices"][0]["text"]
    expect(page.locator("#map .chosen")).to_have_text(tidy(own))
    # A corner is empty: its latent is on the plane, where the page says it is.
    expect(page).to_have_url(PLACE)
    before = page.url
    plot.click(position={"x": box["width"] - 3, "y": 3})
    expect(page).not_to_have_url(before)
    z = latent_in(page.url)
    at = axes @ (z - centre)
    assert z == pytest.approx(centre + at @ axes, abs=1e-5)
    assert (at > np.array([p["at"] for p in points]).max(axis=0)).all()
    text = post(client, "/v1/decode", latent=[z.tolist()])["choices"][0]["text"]
    expect(page.locator("#map .chosen")).to_have_text(tidy(text))
    expect(page.locator("#map .nearby")).to_contain_text("Between the texts")
    other = visit().open("#" + page.url.partition("#")[2])
    expect(other.locator("#map .chosen")).to_have_text(tidy(text))
    page.get_by_role("link", name="Wander from here").click()
    expect(page.locator("#wander .chosen")).to_have_text(tidy(text))


def test_the_map_moves_by_arrow_keys_and_changes_its_colours(visit: Callable, client: httpx.Client) -> None:
    page = visit().open("#map")
    found = client.get("/v1/map").json()
    page.locator("#map svg").focus()
    before, steps = page.url, []
    for key in ("ArrowRight", "Shift+ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
        expect(page).not_to_have_url(before)
        before = page.url
        steps.append(np.array(found["axes"]) @ (latent_in(before) - np.array(found["centre"])))
    assert steps[0][0] > 0 and steps[0][1] == pytest.approx(0, abs=1e-4)
    assert steps[1][0] == pytest.approx(6 * steps[0][0], abs=1e-4)
    assert steps[2][1] == pytest.approx(steps[0][0], abs=1e-4)
    tints = []
    for name in ("Length", "KL", "Data set"):
        page.get_by_label(name).check()
        tints.append(page.locator("#map .dot").evaluate_all("(dots) => dots.map((e) => getComputedStyle(e).stroke)"))
    longest = np.array([p["tokens"] for p in found["points"]]) == max(p["tokens"] for p in found["points"])
    assert len(set(np.array(tints[0])[longest])) == 1 and len(set(tints[0])) > 2 and len(set(tints[1])) > 9
    sources = [p["source"] for p in found["points"]]
    assert len(set(zip(tints[2], sources, strict=True))) == len(set(tints[2])) == 2
    assert texts(page, "#map .key") == list(dict.fromkeys(sources))
    assert "colour=source" in page.url


def test_the_projector_gets_the_latents_and_the_texts(visit: Callable, client: httpx.Client, tmp_path: Path) -> None:
    page = visit().open("#export")
    points = client.get("/v1/map").json()["points"]
    tensors = np.loadtxt(save(page, "tensors.tsv", tmp_path), delimiter="\t", dtype=np.float32)
    assert (tensors == np.array([p["latent"] for p in points], dtype=np.float32)).all()
    header, *rows = save(page, "metadata.tsv", tmp_path).read_text(encoding="utf-8").splitlines()
    assert header.split("\t") == ["text", "source", "tokens", "kl"]
    expected = [[tidy(p["text"]), p["source"], str(p["tokens"])] for p in points]
    assert [row.split("\t")[:3] for row in rows] == expected


def test_a_recorded_page_works_without_a_service(
    visit: Callable, browser: Browser, client: httpx.Client, tmp_path: Path
) -> None:
    page = visit().open("#gradient?" + urlencode({"a": A, "b": f"{B} </script>", "path": "linear"}))
    page.get_by_label("Point t").fill("5")
    expected = {"gradient": page.locator("#gradient .chosen").inner_text()}
    page.get_by_role("link", name="Wander").click()
    page.get_by_role("button", name="Show the neighbourhood").click()
    page.locator("#wander .around button").nth(3).click()
    expect(page.locator("#wander .trail li")).to_have_count(2)
    expected["wander"] = page.locator("#wander .chosen").inner_text()
    page.get_by_role("link", name="Dimensions").click()
    page.get_by_role("button", name="Show its dimensions").click()
    page.locator("#dimensions .dims input").first.fill("3")
    expect(page).to_have_url(PLACE)
    page.get_by_role("link", name="Export").click()
    file = save(page, "latent-space.html", tmp_path)
    expected["dimensions"] = page.locator("#dimensions .chosen").inner_text()

    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', file.read_text(encoding="utf-8"))
    assert policy and re.search(r"script-src 'sha256-[\w+/=]+';", policy[1]) and "unsafe" not in policy[1]
    alone, complaints, asked = browser.new_page(), list[str](), list[str]()
    alone.on("console", lambda message: complaints.append(message.text))
    alone.on("pageerror", lambda error: complaints.append(str(error)))
    alone.on("request", lambda request: asked.append(request.url))
    alone.goto(file.as_uri())
    expect(alone.locator("#gradient .chosen")).to_have_text(expected["gradient"])
    assert texts(alone, "#gradient .recorded a") == [f"{A} → {B} </script>"]
    alone.get_by_role("link", name="Wander").click()
    assert texts(alone, "#wander .recorded a")[1] == expected["wander"]
    alone.locator("#wander .recorded a").nth(1).click()
    expect(alone.locator("#wander .chosen")).to_have_text(expected["wander"])
    alone.get_by_role("link", name="Dimensions").click()
    expect(alone.locator("#dimensions .chosen")).to_have_text(expected["dimensions"])
    alone.get_by_role("link", name="Analogy").click()
    expect(alone.locator("#analogy .recorded")).to_contain_text("This panel needs a service")
    alone.get_by_role("link", name="Map").click()
    expect(alone.locator("#map .dot")).to_have_count(len(client.get("/v1/map").json()["points"]))
    # Its places are a grid: what is in the upper left one was asked for when the page was saved.
    middle = alone.locator("#map .chosen").inner_text()
    alone.locator("#map svg").click(position={"x": 3, "y": 3})
    expect(alone).to_have_url(PLACE)
    text = post(client, "/v1/decode", latent=[latent_in(alone.url).tolist()])["choices"][0]["text"]
    expect(alone.locator("#map .chosen")).to_have_text(tidy(text))
    assert tidy(text) != middle
    alone.get_by_role("link", name="Dimensions").click()
    alone.locator("#dimensions .dims input").first.fill("-3")
    expect(alone.locator("#dimensions .error")).to_contain_text("This page is a recording")
    expect(alone.locator("#dimensions .chosen")).to_have_text("…")
    alone.get_by_role("link", name="Health").click()
    expect(alone.locator("#health .chosen")).to_have_text("Ready")
    alone.close()
    assert complaints == [] and {url.split(":")[0] for url in asked} <= {"file", "data"}


def save(page: Page, name: str, folder: Path) -> Path:
    """The file that a button of the export panel gives."""
    with page.expect_download() as downloading:
        page.get_by_role("button", name=name).click()
    assert downloading.value.suggested_filename == name
    downloading.value.save_as(folder / name)
    return folder / name


def place_of(page: Page, number: int) -> tuple[float, float]:
    """Where a point is drawn, in CSS pixels of the plot."""
    dot, plot = (page.locator(f"#map {one}").bounding_box() for one in (f".dot >> nth={number}", "svg"))
    return dot["x"] + dot["width"] / 2 - plot["x"], dot["y"] + dot["height"] / 2 - plot["y"]


def loneliest(points: list[dict]) -> int:
    """The point that is farthest from its nearest neighbour: nothing else is under the pointer there."""
    at = np.array([p["at"] for p in points])
    far = np.linalg.norm(at[:, None] - at[None], axis=-1)
    # The twin data set has every point a second time.
    far[far == 0] = np.inf
    return int(far.min(axis=1)[: len(points) // 2].argmax())


def test_a_page_recorded_of_another_model_answers_for_it(
    visit: Callable, browser: Browser, client: httpx.Client, tmp_path: Path
) -> None:
    second = client.get("/v1/models").json()["data"][1]["id"]
    page = visit().open(f"#map?model={second}")
    page.locator("#map .plot").wait_for()
    page.get_by_role("link", name="Export").click()
    file = save(page, "latent-space.html", tmp_path)
    alone = browser.new_page()
    alone.goto(file.as_uri())
    alone.get_by_role("link", name="Map").click()
    points = client.get("/v1/map", params={"model": second}).json()["points"]
    expect(alone.locator("#map .dot")).to_have_count(len(points))
    alone.get_by_role("link", name="Health").click()
    expect(alone.locator("#health dd").first).to_have_text(second)
    alone.close()
