"""A visit of the explorer page in Chromium, for the tests of the page."""

from __future__ import annotations

import base64
import re
from urllib.parse import parse_qs

import httpx
import numpy as np
from playwright.sync_api import Page

A, B, C = "the old sailor watched a small boat", "one tired teacher forgot the long road", "every tall engine"
PLACE = re.compile(r"[?&]z=")


class Visit:
    """A page of the explorer, and all that it complained of."""

    def __init__(self, page: Page, client: httpx.Client) -> None:
        self.page, self.base, self.complaints = page, str(client.base_url).rstrip("/"), list[str]()
        self.key = client.headers["authorization"].removeprefix("Bearer ")
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('policy: ' + e.violatedDirective))"
        )

    def open(self, address: str = "", with_key: bool = True) -> Page:
        """A fresh load of the page at an address, where the key was given before or not."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.base}/healthz")
        script = "(key) => key === null ? sessionStorage.clear() : sessionStorage.setItem('key', key)"
        self.page.evaluate(script, self.key if with_key else None)
        self.complaints.clear()  # of the browser, on what is no page
        self.page.goto(f"{self.base}/{address}")
        return self.page


def texts(page: Page, selector: str) -> list[str]:
    page.locator(selector).first.wait_for()
    return page.locator(selector).all_inner_texts()


def tidy(text: str) -> str:
    """As a page shows it."""
    return re.sub(r"\s+", " ", text).strip() or "(an empty text)"


def post(client: httpx.Client, path: str, **body: object) -> dict:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict = answer.json()
    return found


def latent_in(url: str) -> np.ndarray:
    """z of an address, read apart from the page's own code."""
    (packed,) = parse_qs(url.partition("?")[2])["z"]
    return np.frombuffer(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)), dtype="<f4").astype(np.float64)
