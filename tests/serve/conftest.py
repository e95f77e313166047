"""A served model that the tests of the endpoint share."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from chromium import Visit
from playwright.sync_api import Browser, sync_playwright
from service import KEY, export, serving
from support import RayCluster

from vae_dist.decode.latent_ops import TextModel
from vae_dist.export.model_dir import load_model
from vae_dist.model.precision import autocast_dtype


@pytest.fixture(scope="package")
def model_dir(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights: the text is nonsense, the service must not care."""
    path = tmp_path_factory.mktemp("model") / "model"
    export(path, dataset_dir, 5)
    return path


@pytest.fixture(scope="package")
def map_texts(dataset_dir: Path, model_dir: Path) -> list[Path]:
    """Two data sets for the map; of the second only the name is another."""
    return [dataset_dir, shutil.copytree(dataset_dir, model_dir.parent / "twin")]


@pytest.fixture(scope="package")
def client(
    ray_cluster: RayCluster, model_dir: Path, dataset_dir: Path, map_texts: list[Path]
) -> Iterator[httpx.Client]:
    """A running `vae-dist serve` of two models, of which tests that name none ask the first; stopped with SIGINT."""
    export(model_dir.parent / "second", dataset_dir, 6)
    keys = model_dir.parent / "keys"
    keys.write_text(f"# who may ask\ntests:{KEY}\n")
    keys.chmod(0o600)
    texts = [argument for path in map_texts for argument in ("--texts", str(path))]
    models = (str(model_dir), f"second={model_dir.parent / 'second'}")
    with serving(ray_cluster, *models, "--keys", str(keys), *texts) as (http, process):
        yield http
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert KEY not in errors


@pytest.fixture(scope="package")
def model(model_dir: Path) -> TextModel:
    loaded = load_model(model_dir)
    dtype = autocast_dtype("auto", torch.device("cpu"))
    return TextModel(loaded.vae, loaded.tokenizer, loaded.max_tokens, dtype)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The machine's own Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        message = "no Chromium is installed (apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser, client: httpx.Client) -> Iterator[Callable[..., Visit]]:
    """Opens a page; at the end none may have complained."""
    visits: list[Visit] = []

    def start(width: int = 1280, scheme: str = "light") -> Visit:
        size = {"width": width, "height": 850}
        page = browser.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        visits.append(Visit(page, client))
        return visits[-1]

    yield start
    for one in visits:
        one.page.close()
    assert [one.complaints for one in visits] == [[]] * len(visits)
