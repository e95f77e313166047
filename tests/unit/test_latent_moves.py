"""Ways through the latent space, against what they promise; and a text's likelihood, against a quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vae_dist.config.model_schema import LstmConfig, ModelConfig, VmfConfig
from vae_dist.data.text.special_ids import EOS_ID
from vae_dist.decode.encode import Encoded, encode, likelihood
from vae_dist.decode.latent_moves import analogy, neighbors, traverse
from vae_dist.model.vae import TextVAE

VOCAB = 20


def vae(latent_dim: int = 1, **changes: object) -> TextVAE:
    torch.manual_seed(3)
    part = LstmConfig(hidden_dim=8)
    config = ModelConfig(embedding_dim=8, encoder=part, decoder=part, latent_dim=latent_dim, **changes)
    model = TextVAE(config, VOCAB).eval()
    with torch.no_grad():
        # A decoder that z means something to.
        model.decoder.to_cell.weight.mul_(4.0)
    return model


def encoded(model: TextVAE, lengths: tuple[int, ...] = (3, 6)) -> list[Encoded]:
    draw = np.random.default_rng(0)
    ids = [np.append(draw.integers(4, VOCAB, length), EOS_ID) for length in lengths]
    return encode(model, ids, [False] * len(ids))


@pytest.mark.parametrize("shape", [(5,), (4, 5)])
def test_neighbors_lie_at_the_radius_in_all_directions(shape: tuple[int, ...]) -> None:
    mean = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    points = neighbors(mean, 2.5, 2000, 7, is_sphere=False)
    step = points - mean
    torch.testing.assert_close(step.norm(dim=-1), torch.full((2000, *shape[:-1]), 2.5))
    # Uniform on the sphere: mean 0 and covariance r^2 / D, each within five standard errors.
    flat = step.reshape(-1, 5)
    assert float(flat.mean(0).abs().max()) < 5 * 2.5 / math.sqrt(5 * len(flat))
    covariance = flat.T @ flat / len(flat)
    assert float((covariance - torch.eye(5) * 2.5**2 / 5).abs().max()) < 5 * 2.5**2 / math.sqrt(len(flat))


def test_a_neighbor_is_its_seeds_alone() -> None:
    mean = torch.zeros(3)
    points = neighbors(mean, 1.0, 5, 10, is_sphere=False)
    assert torch.equal(neighbors(mean, 1.0, 1, 12, is_sphere=False)[0], points[2])
    assert torch.equal(neighbors(mean, 0.0, 3, 0, is_sphere=False), mean.expand(3, 3))


def test_analogy_and_traverse_do_what_their_names_say() -> None:
    a, b, c = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).unbind()
    torch.testing.assert_close(analogy(a, b, a, 1.0, is_sphere=False), b)
    torch.testing.assert_close(analogy(a, b, c, 0.0, is_sphere=False), c)
    points = traverse(c, 2, [-1.0, 0.5], is_sphere=False)
    assert points[:, 2].tolist() == [-1.0, 0.5]
    others = [0, 1, 3]
    torch.testing.assert_close(points[:, others], c[others].expand(2, 3))


def test_on_the_sphere_every_way_stays_there() -> None:
    a, b, c = torch.nn.functional.normalize(torch.randn(3, 6), dim=-1).unbind()
    moved = [
        neighbors(a, 0.7, 9, 0, is_sphere=True),
        analogy(a, b, c, 2.0, is_sphere=True)[None],
        traverse(a, 1, [-2.0, 2.0], is_sphere=True),
    ]
    for points in moved:
        torch.testing.assert_close(points.norm(dim=-1), torch.ones(len(points)))


def test_the_likelihood_of_a_text_is_the_integral_over_its_latent() -> None:
    model = vae()
    texts = encoded(model)
    found = likelihood(model, texts, 5000)
    grid = torch.linspace(-9.0, 9.0, 3001)
    log_prior = -0.5 * (grid.square() + math.log(2 * math.pi))
    for text, one in zip(texts, found, strict=True):
        tokens = torch.tensor(text.ids)[None].expand(len(grid), -1)
        shifted = torch.cat([torch.ones(len(grid), 1, dtype=torch.int64), tokens[:, :-1]], dim=1)
        with torch.no_grad():
            hidden = model.decoder(model.embedding(shifted), grid[:, None], torch.full((len(grid),), len(text.ids)))
            logits = model.to_embedding(hidden) @ model.embedding.weight.T + model.output_bias
        log_p = torch.log_softmax(logits.double(), -1).gather(-1, tokens[..., None])[..., 0].sum(-1)
        exact = float(torch.logsumexp(log_p + log_prior, 0)) + math.log(float(grid[1] - grid[0]))
        assert one["iw_nll"] == pytest.approx(-exact, abs=0.03)
        # The ELBO is below, by the KL from the posterior to the true one.
        density = -0.5 * (text.logvar.double() + math.log(2 * math.pi))
        log_q = density - 0.5 * (grid.double() - text.mean.double()).square() / text.logvar.double().exp()
        elbo = float((log_q.exp() * (log_p + log_prior - log_q)).sum() * (grid[1] - grid[0]))
        assert one["elbo"] == pytest.approx(elbo, abs=0.06)
        assert one["elbo"] < -one["iw_nll"] + 1e-6
        assert one["tokens"] == len(text.ids)


def test_a_texts_likelihood_is_its_own_in_any_company() -> None:
    model = vae(latent_dim=3)
    texts = encoded(model, (3, 6, 7, 15, 2))
    together = likelihood(model, texts, 25)
    assert [likelihood(model, [text], 25)[0] for text in texts] == together


def test_a_von_mises_fisher_model_has_its_constant_kl() -> None:
    model = vae(latent_dim=4, posterior=VmfConfig(kappa=20.0))
    first, second = likelihood(model, encoded(model), 20)
    assert first["kl"] == pytest.approx(second["kl"]) and first["kl"] > 0
