"""The explorer page: a real Chromium, on the served model, used as a person would."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import httpx
import numpy as np
import pytest
from chromium import A, B, C, post, texts, tidy
from playwright.sync_api import expect

PANELS = ("gradient", "wander", "analogy", "map", "dimensions", "export", "health")


def test_gradient_shows_the_texts_of_the_service_and_the_slider_chooses(visit: Callable, client: httpx.Client) -> None:
    page = visit().open()
    page.get_by_role("textbox", name="From").fill(A)
    page.get_by_role("textbox", name="To").fill(B)
    page.get_by_role("button", name="Show the gradient").click()
    shown = texts(page, "#gradient .ribbon li > span:nth-child(2)")
    points = post(client, "/v1/interpolate", a=A, b=B, steps=7)["points"]
    assert shown == [tidy(p["text"]) for p in points]
    assert texts(page, "#gradient .original") == [f"reconstructed from: {A}", f"reconstructed from: {B}"]
    page.get_by_label("Point t").fill("6")
    expect(page.locator("#gradient .chosen")).to_have_text(shown[6])
    expect(page.locator("#gradient li[aria-current=true]")).to_have_count(1)
    expect(page.locator("#gradient li").nth(6)).to_have_attribute("aria-current", "true")
    with page.expect_response("**/v1/interpolate") as asked:
        page.get_by_label("Slerp").check()
    assert asked.value.request.post_data_json["path"] == "slerp"


def test_wander_moves_to_a_neighbor_and_the_trail_leads_back(visit: Callable, client: httpx.Client) -> None:
    one = visit()
    page = one.open()
    page.get_by_role("link", name="Wander").click()
    page.get_by_label("Sentence").locator("visible=true").fill(A)
    page.get_by_label("Radius").fill("5")
    page.get_by_role("button", name="Show the neighbourhood").click()
    around = texts(page, "#wander .around button")
    choices = post(client, "/v1/neighbors", input=A, radius=5.0, n=9, seed=0)["choices"]
    assert around == [tidy(c["text"]) for c in choices]
    page.locator("#wander .around button").nth(4).click()
    expect(page.locator("#wander .trail li")).to_have_count(2)
    expected = post(client, "/v1/neighbors", latent=choices[4]["latent"], radius=5.0, n=9, seed=0)
    assert texts(page, "#wander .around button") == [tidy(c["text"]) for c in expected["choices"]]
    expect(page.locator("#wander .chosen")).to_have_text(around[4])
    page.locator("#wander .trail a").first.click()
    expect(page.locator("#wander .trail li")).to_have_count(1)
    assert texts(page, "#wander .around button") == around


def test_analogy_takes_the_strength(visit: Callable, client: httpx.Client) -> None:
    page = visit().open("#analogy")
    for label, text in (("First", A), ("is to second", B), ("as third", C)):
        page.get_by_label(label).fill(text)
    page.get_by_label("Strength").fill("-0.5")
    page.get_by_role("button", name="Find the fourth").click()
    expected = post(client, "/v1/analogy", a=A, b=B, c=C, strength=-0.5)
    assert texts(page, "#analogy .chosen") == [tidy(expected["choices"][0]["text"])]
    assert texts(page, "#analogy dd") == [tidy(text) for text in expected["reconstructions"]]


def test_dimensions_show_their_kl_and_a_slider_changes_the_text(visit: Callable, client: httpx.Client) -> None:
    one = visit()
    page = one.open("#dimensions")
    page.get_by_label("Sentence").locator("visible=true").fill(A)
    page.get_by_role("button", name="Show its dimensions").click()
    page.locator("#dimensions .dims li").first.wait_for()
    (encoding,) = post(client, "/v1/encode", input=[A])["data"]
    mean, variance = np.array(encoding["mean"]), np.exp(encoding["logvar"])
    kl = 0.5 * (mean**2 + variance - 1 - np.log(variance))
    order = np.argsort(-kl)
    assert texts(page, "#dimensions .kl") == [f"{kl[d]:.2f}" for d in order]
    dead = page.locator("#dimensions .dims li.dead")
    expect(dead).to_have_count(int((kl < 0.01).sum()))
    slider = page.get_by_label(f"z{order[0]}")
    with page.expect_response("**/v1/decode") as asked:
        slider.fill("3.5")
    mean[order[0]] = 3.5
    assert asked.value.request.post_data_json["latent"][0] == pytest.approx(mean.tolist(), abs=1e-6)
    text = tidy(post(client, "/v1/decode", latent=[mean.tolist()])["choices"][0]["text"])
    expect(page.locator("#dimensions .chosen")).to_have_text(text)
    # The address has moved along: elsewhere it shows the same.
    other = visit().open("#" + page.url.partition("#")[2])
    expect(other.locator("#dimensions .chosen")).to_have_text(text)
    expect(other.get_by_label(f"z{order[0]}")).to_have_value("3.5")


def test_health_is_the_model_card(visit: Callable, client: httpx.Client) -> None:
    page = visit().open()
    page.get_by_role("link", name="Health").click()
    rows = dict(zip(texts(page, "#health dt"), texts(page, "#health dd"), strict=True))
    info = client.get("/v1/info").json()
    assert rows["Model"] == info["model"] and rows["Weights, SHA-256"] == info["weights_sha256"]
    assert rows["Parameters"] == f"{info['parameters']:,}" and rows["Longest text"] == "16 tokens"
    assert texts(page, "#health .chosen") == ["Ready"]
    assert rows["Rows being decoded"] == "0 of 64" and rows["Rows waiting"] == "0"
    # What was written a moment ago is in the mean over the last ten seconds.
    post(client, "/v1/sample", n=64, seed=0)
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator("#health dd").nth(1)).to_have_text(re.compile(r"^[1-9]\d* tokens a second, over the last ten$"))


def test_an_address_brings_back_what_it_was_copied_from(visit: Callable) -> None:
    page = visit().open("#wander")
    page.get_by_label("Sentence").locator("visible=true").fill(f"{A} & 50% ünïcode?")
    page.get_by_label("Draw").fill("7")
    page.get_by_role("button", name="Show the neighbourhood").click()
    page.locator("#wander .around button").nth(2).click()
    expect(page.locator("#wander .trail li")).to_have_count(2)
    before, url = texts(page, "#wander .around button"), page.url
    other = visit().open("#" + url.partition("#")[2])
    assert texts(other, "#wander .around button") == before
    expect(other.get_by_label("Sentence").locator("visible=true")).to_have_value(f"{A} & 50% ünïcode?")
    expect(other.get_by_label("Draw")).to_have_value("7")
    # And back, in the browser that it was made in.
    page.go_back()
    expect(page.locator("#wander .trail li")).to_have_count(1)


FOCUSED = """(selector) => {
  const focused = document.activeElement;
  return [focused.matches(selector), getComputedStyle(focused).outlineStyle];
}"""


def test_the_model_can_be_chosen_and_links_keep_it(visit: Callable, client: httpx.Client) -> None:
    first, second = (one["id"] for one in client.get("/v1/models").json()["data"])
    page = visit().open(f"#gradient?{urlencode({'a': A, 'b': B, 'path': 'linear'})}")
    shown = texts(page, "#gradient .ribbon li > span:nth-child(2)")
    chosen = page.get_by_label("Model")
    expect(chosen).to_have_value(first)
    chosen.select_option(second)
    points = post(client, "/v1/interpolate", a=A, b=B, steps=7, model=second)["points"]
    expect(page.locator("#gradient .ribbon li > span:nth-child(2)")).to_have_text([tidy(p["text"]) for p in points])
    assert shown != [tidy(p["text"]) for p in points]
    page.get_by_role("link", name="Health").click()
    expect(page.locator("#health dd").first).to_have_text(second)
    page.get_by_role("link", name="Map").click()
    page.locator("#map .plot").wait_for()
    with page.expect_response("**/v1/decode") as asked:
        page.locator("#map svg").click()
    assert asked.value.request.post_data_json["model"] == second
    expect(page).to_have_url(re.compile(f"#map.*z=.*model={second}"))
    # The address alone brings the model back, and a history without one the first.
    other = visit().open("#" + page.url.partition("#")[2])
    expect(other.locator("#map .chosen")).to_have_text(texts(page, "#map .chosen")[0])
    expect(other.get_by_label("Model")).to_have_value(second)
    for _ in range(3):
        page.go_back()
    expect(chosen).to_have_value(first)
    expect(page.locator("#gradient .ribbon li > span:nth-child(2)")).to_have_text(shown)


def test_from_a_model_that_is_gone_there_is_a_way_back(visit: Callable, client: httpx.Client) -> None:
    one = visit()
    page = one.open("#health?model=gone")
    expect(page.locator("#health .error")).to_contain_text("no model 'gone'")
    page.get_by_label("Model").select_option(index=0)
    expect(page.locator("#health dd").first).to_have_text(client.get("/v1/info").json()["model"])
    expect(page.locator("#health .error")).to_be_empty()
    one.complaints.clear()  # Chromium's own, on the 404


def test_the_keyboard_is_enough(visit: Callable) -> None:
    page = visit().open()

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            # Past the last one it is the body's turn, before the first one comes again.
            found, outline = page.evaluate(FOCUSED, selector)
            if found:
                assert outline == "solid", "the focus is not seen"
                return
        raise AssertionError(f"the Tab key does not reach {selector}")

    tab_to("#gradient button[type=submit]")
    page.keyboard.press("Enter")
    page.locator("#gradient .ribbon li").first.wait_for()
    tab_to("#gradient .travel input")
    page.keyboard.press("End")
    expect(page.locator("#gradient li").nth(6)).to_have_attribute("aria-current", "true")
    tab_to("header a[href='#wander']")
    page.keyboard.press("Enter")
    tab_to("#wander textarea")
    page.keyboard.press("Enter")
    page.locator("#wander .around button").first.wait_for()
    tab_to("#wander .around button")
    page.keyboard.press("Enter")
    expect(page.locator("#wander .trail li")).to_have_count(2)
    expect(page.locator("#wander .results")).to_be_focused()


def test_the_key_is_asked_for_once_and_kept_in_the_tab(visit: Callable) -> None:
    one = visit()
    page = one.open("#health", with_key=False)
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key").fill("this-is-not-the-key")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog.get_by_role("alert")).to_have_text("The service does not know this key.")
    dialog.get_by_label("Key").fill(one.key)
    page.keyboard.press("Enter")
    page.locator("#health dd").first.wait_for()
    page.get_by_role("link", name="Gradient").click()
    page.get_by_role("button", name="Show the gradient").click()
    page.locator("#gradient .ribbon li").first.wait_for()
    expect(dialog).to_be_hidden()
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    assert one.key not in page.url
    # Chromium itself logs answers of 4xx.
    assert all("401" in complaint for complaint in one.complaints) and one.complaints
    one.complaints.clear()


def test_what_goes_wrong_is_said_in_words(visit: Callable) -> None:
    one = visit()
    page = one.open("#health", with_key=False)
    page.get_by_role("button", name="Cancel").click()
    error = page.locator("#health .error")
    expect(error).to_have_text("The service answers only with a key.")
    page = one.open("#wander?input=the+boat&z=AAAA")
    expect(page.locator("#wander .error")).to_contain_text("broken latent")
    page = one.open("#wander?input=the+boat&radius=2&seed=0&z=AACAPw")
    expect(page.locator("#wander .error")).to_contain_text("1 dimensions; this model's have 4")
    page.route("**/v1/interpolate", lambda route: route.abort())
    page.get_by_role("link", name="Gradient").click()
    page.get_by_role("button", name="Show the gradient").click()
    expect(page.locator("#gradient .error")).to_contain_text("cannot be reached")
    expect(page.locator("#gradient .results")).not_to_have_attribute("aria-busy", "true")
    one.complaints.clear()  # Chromium's own, on answers of 4xx and the lost request


@pytest.mark.long
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_page_fits_and_its_text_stands_out(visit: Callable, tmp_path: Path, width: int, scheme: str) -> None:
    """Screenshots stay in pytest's folder. 4.5 is what WCAG 2.2 asks of text, success criterion 1.4.3."""
    one = visit(width, scheme)
    start = urlencode({"a": A, "b": B, "c": C, "input": A, "strength": 1, "radius": 2, "seed": 0, "path": "linear"})
    for panel in PANELS:
        page = one.open(f"#{panel}?{start}")
        page.locator(f"#{panel} .results > *").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{panel} is wider than the screen"
        for selector in (".lead", ".chosen", "label", "button", ".note", "h2", "footer p", "header nav a"):
            element = page.locator(selector).locator("visible=true")
            if element.count():
                colors = element.first.evaluate(COLORS)
                assert contrast(*colors) >= 4.5, (panel, selector, colors)
        page.screenshot(path=tmp_path / f"{panel}-{width}-{scheme}.png", full_page=True)
    dark = luminance(page.locator("body").evaluate("(e) => getComputedStyle(e).backgroundColor")) < 0.2
    assert dark == (scheme == "dark")


COLORS = """(e) => {
  let under = e;
  while (getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)') under = under.parentElement;
  return [getComputedStyle(e).color, getComputedStyle(under).backgroundColor];
}"""


def luminance(color: str) -> float:
    """Relative luminance of `rgb(...)`, WCAG 2.2."""
    channels = np.array([int(value) for value in re.findall(r"\d+", color)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_only_the_page_is_open_and_it_may_run_nothing_else(client: httpx.Client) -> None:
    nobody = {"authorization": ""}
    page = client.get("/", headers=nobody)
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    for name in re.findall(r'(?:href|src)="(explorer/[^"]+)"', page.text):
        assert client.get(f"/{name}", headers=nobody).status_code == 200
    for path in ("/v1/info", "/explorer", "/openapi.json"):
        assert client.get(path, headers=nobody).status_code == 401
    for path in ("/explorer/../app.py", "/explorer/%2e%2e/app.py", "/explorer/..%2f..%2fv1/info", "/explorer/"):
        assert client.get(path, headers=nobody).status_code in (401, 404), path
