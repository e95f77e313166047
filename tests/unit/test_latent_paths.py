"""Latents of tokens, latents on the sphere, and the ways between latents."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vae_dist.config.model_schema import LstmConfig, ModelConfig, VmfConfig
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.text.special_ids import EOS_ID
from vae_dist.data.text.tokenizer import build_tokenizer
from vae_dist.decode.latent_moves import slerp
from vae_dist.decode.latent_ops import TextModel
from vae_dist.decode.prior import prior_latents
from vae_dist.decode.request import Decoding
from vae_dist.errors import DataError
from vae_dist.model.vae import TextVAE

WORDS = [f"w{i:02d}" for i in range(30)]
GREEDY = Decoding(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def token_model() -> TextModel:
    """A latent for every token, decoded without the words before."""
    part = LstmConfig(hidden_dim=8)
    torch.manual_seed(2)
    config = ModelConfig(
        embedding_dim=8, encoder=part, decoder=part, latent_dim=3, latent="token", injection="embedding",
        teacher_forcing=False, bidirectional=True,
    )  # fmt: skip
    tokenizer = build_tokenizer([" ".join(WORDS)], PrepareConfig(tokenizer="word"))
    vae = TextVAE(config, tokenizer.vocab_size).eval()
    # No row ends by itself: what bounds it is its own length.
    vae.output_bias.data[EOS_ID] = -30.0
    return TextModel(vae, tokenizer, 12)


def test_a_reconstruction_from_latents_of_tokens_is_the_same_in_company(token_model: TextModel) -> None:
    short, long = "w01 w02", "w03 w04 w05 w06 w07 w08"
    together, rows = token_model.reconstruct([short, long], 0, GREEDY)
    assert together == [token_model.reconstruct([text], 0, GREEDY)[0][0] for text in (short, long)]
    assert [len(row.tokens) for row in rows] == [3, 7] and not any(row.finished for row in rows)
    _t, texts, _ = token_model.interpolate(short, long, 5, "linear", 0, GREEDY)
    assert (texts[0], texts[-1]) == tuple(together)
    assert [len(token_model.tokenizer.encode_batch([text])[0]) - 1 for text in texts] == [3, 4, 5, 6, 7]


def test_latents_of_tokens_have_noise_of_their_own_for_every_seed(token_model: TextModel) -> None:
    seeds = [0, 2**44, 2**43, 2**61, 0]
    z_BTD = prior_latents(token_model.vae, seeds, 12)
    assert torch.equal(z_BTD[0], z_BTD[4]) and len({round(float(v), 5) for v in z_BTD[:4].flatten()}) == 4 * 12 * 3
    assert torch.equal(z_BTD[:, :5], prior_latents(token_model.vae, seeds, 5))


@pytest.mark.parametrize("latent", ["sequence", "token"])
def test_latents_on_the_sphere_stay_on_it(latent: str) -> None:
    part = LstmConfig(hidden_dim=8)
    torch.manual_seed(0)
    config = ModelConfig(
        embedding_dim=8, encoder=part, decoder=part, latent_dim=4, latent=latent, injection="embedding",
        posterior=VmfConfig(kappa=10.0),
    )  # fmt: skip
    tokenizer = build_tokenizer([" ".join(WORDS)], PrepareConfig(tokenizer="word"))
    model = TextModel(TextVAE(config, tokenizer.vocab_size).eval(), tokenizer, 12)
    z = prior_latents(model.vae, range(50), 12)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(z.shape[:-1]))
    with pytest.raises(DataError, match="off the sphere"):
        prior_latents(model.vae, [0], 12, scale=0.5)
    _t, requests = model.interpolate_requests(*model.encode(["w01 w02 w03", "w04"]), 4, "linear", 0, GREEDY)
    norms = torch.cat([request.z.norm(dim=-1).flatten() for request in requests])
    torch.testing.assert_close(norms, torch.ones_like(norms))


def unit(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_slerp_keeps_to_the_circle_at_constant_speed() -> None:
    a, b = unit(1.0, 0.0, 0.0), unit(0.0, 1.0, 0.0)
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        point = slerp(a, b, torch.tensor(share, dtype=torch.float64))
        angle = share * math.pi / 2
        torch.testing.assert_close(point, unit(math.cos(angle), math.sin(angle), 0.0), atol=1e-12, rtol=0.0)


@given(st.lists(st.floats(-3, 3), min_size=8, max_size=8), st.floats(0, 1))
def test_slerp_is_symmetric_and_interpolates_the_length(values: list[float], share: float) -> None:
    a, b = unit(*values[:4]), unit(*values[4:])
    t = torch.tensor(share, dtype=torch.float64)
    point = slerp(a, b, t)
    assert point.isfinite().all()
    torch.testing.assert_close(slerp(b, a, 1 - t), point, atol=1e-6, rtol=1e-6)
    cosine = float(F.cosine_similarity(a, b, dim=0))
    if min(a.norm(), b.norm()) > 1e-3 and abs(cosine) < 0.999:
        length = torch.lerp(a.norm(), b.norm(), t)
        torch.testing.assert_close(point.norm(), length, atol=1e-6, rtol=1e-6)


def test_slerp_ends_exactly_and_handles_what_has_no_great_circle() -> None:
    a, zero, half = unit(1.0, 2.0), unit(0.0, 0.0), torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(slerp(a, 2 * a, half), 1.5 * a)
    torch.testing.assert_close(slerp(a, -a, half), zero)
    torch.testing.assert_close(slerp(zero, a, half), a / 2)
    torch.testing.assert_close(slerp(a, zero, half), a / 2)
    torch.testing.assert_close(slerp(zero, zero, half), zero)
    b = unit(-2.0, 0.5)
    torch.testing.assert_close(slerp(a, b, torch.tensor(0.0, dtype=torch.float64)), a)
    torch.testing.assert_close(slerp(a, b, torch.tensor(1.0, dtype=torch.float64)), b)
