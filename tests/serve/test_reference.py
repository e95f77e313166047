"""The reference is what the schemas say, and its examples run."""

from __future__ import annotations

import httpx
import pytest

from vae_dist.serve.api import build_api
from vae_dist.serve.reference import API_MD, render

DOCUMENT = build_api().openapi()
ASKED = [path for path, methods in DOCUMENT["paths"].items() if "post" in methods]


def example(path: str) -> dict:
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    body: dict = DOCUMENT["components"]["schemas"][schema.rpartition("/")[2]]["example"]
    return body


def test_the_reference_is_that_of_the_schemas() -> None:
    assert API_MD.read_text(encoding="utf-8") == render(DOCUMENT), "run python -m vae_dist.serve.reference"


@pytest.mark.parametrize("path", ASKED)
def test_the_example_of_each_endpoint_runs(client: httpx.Client, path: str) -> None:
    answer = client.post(path, json=example(path))
    assert answer.status_code == 200, answer.text
    schema = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    required = DOCUMENT["components"]["schemas"][schema.rpartition("/")[2]]["required"]
    assert set(required) <= answer.json().keys()
    assert f"-d '{__import__('json').dumps(example(path))}'" in API_MD.read_text(encoding="utf-8")
