"""The map of the endpoint: which texts it shows, and where it puts them."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest

from vae_dist.config.model_schema import LstmConfig, ModelConfig
from vae_dist.data.store.dataset import Dataset
from vae_dist.decode.latent_ops import TextModel
from vae_dist.errors import DataError
from vae_dist.model.vae import TextVAE
from vae_dist.serve import latent_map as module
from vae_dist.serve.latent_map import latent_map, principal_axes, validation_texts


def test_the_map_is_the_plane_of_largest_variance(client: httpx.Client, map_texts: list[Path]) -> None:
    """Against the eigenvectors of the covariance, of latents and scores that other endpoints give."""
    found = client.get("/v1/map").json()
    points, split = found["points"], Dataset.open(map_texts[0]).split("valid")
    assert [p["source"] for p in points] == [path.name for path in map_texts for _ in range(split.sequences)]
    some = [p["text"] for p in points[:64]]
    encoded = client.post("/v1/encode", json={"input": some}).json()["data"]
    scored = client.post("/v1/score", json={"input": some, "importance_samples": 1}).json()["data"]
    assert [p["latent"] for p in points[:64]] == [pytest.approx(one["mean"], rel=1e-6) for one in encoded]
    assert [(p["tokens"], p["kl"]) for p in points[:64]] == [(s["tokens"], pytest.approx(s["kl"])) for s in scored]
    z_ND = np.array([p["latent"] for p in points])
    variance, directions = np.linalg.eigh(np.cov(z_ND.T))
    axes = np.array(found["axes"])
    assert np.abs(axes @ directions[:, ::-1]) == pytest.approx(np.eye(2, z_ND.shape[1]), abs=1e-4)
    assert found["shares"] == pytest.approx(variance[::-1][:2] / variance.sum(), rel=1e-4)
    assert np.array([p["at"] for p in points]) == pytest.approx((z_ND - z_ND.mean(0)) @ axes.T, abs=1e-5)


def test_a_large_split_is_shown_from_its_beginning_to_its_end(
    map_texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corpora are sorted by length, or by source: the first texts are not like the others."""
    monkeypatch.setattr(module, "MAX_POINTS", 20)
    dataset = Dataset.open(map_texts[0])
    split = dataset.split("valid")
    assert split.sequences > 20
    chosen = [dataset.tokenizer.decode(split.read(i * split.sequences // 10, 1)[0]) for i in range(10)]
    assert validation_texts([str(path) for path in map_texts]) == [(p.name, text) for p in map_texts for text in chosen]


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data set directory"):
        validation_texts([str(tmp_path / "nothing")])


def test_a_direction_that_the_points_do_not_have_is_zero() -> None:
    centre, axes, shares = principal_axes(np.array([[1.0], [4.0]]))
    assert (centre.tolist(), axes.tolist(), shares.tolist()) == ([2.5], [[1.0], [0.0]], [1.0, 0.0])
    centre, axes, shares = principal_axes(np.array([[3.0, -1.0]]))
    assert centre.tolist() == [3.0, -1.0] and shares.tolist() == [0.0, 0.0]


def test_largest_entries_point_up_so_that_a_map_stays_as_it_is() -> None:
    x_ND = np.random.default_rng(0).normal(size=(50, 4)) * [5.0, 3.0, 1.0, 0.5]
    for sign in (1.0, -1.0):
        _, axes, _ = principal_axes(sign * x_ND)
        assert all(axis[np.abs(axis).argmax()] > 0 for axis in axes)


@pytest.mark.parametrize("latent", ["none", "token"])
def test_a_model_without_one_latent_a_text_has_no_map(dataset_dir: Path, latent: str) -> None:
    tokenizer, lstm = Dataset.open(dataset_dir).tokenizer, LstmConfig(hidden_dim=8)
    config = ModelConfig(embedding_dim=8, latent_dim=4, latent=latent, encoder=lstm, decoder=lstm)
    model = TextModel(TextVAE(config, tokenizer.vocab_size).eval(), tokenizer, 16)
    assert latent_map(model, [("set", "the old sailor")]).points == []
