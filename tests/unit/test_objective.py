"""The objective: schedules at their corners, and the loss against an independent computation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from vae_dist.config.model_schema import LstmConfig, ModelConfig
from vae_dist.config.objective_schema import ObjectiveConfig
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import Batch, collate
from vae_dist.data.text.special_ids import BOS_ID, EOS_ID
from vae_dist.model.vae import TextVAE
from vae_dist.objective.elbo import ElboTerms, NegativeElbo, loss_scale

RNG = torch.tensor([1, 2])
VOCAB = 17


def make_vae(dropout: float = 0.0) -> TextVAE:
    part = LstmConfig(hidden_dim=9)
    torch.manual_seed(0)
    return TextVAE(
        ModelConfig(embedding_dim=7, encoder=part, decoder=part, latent_dim=4, dropout=dropout), VOCAB
    ).double()


def make_batch(lengths: list[int], weights: list[float] | None = None) -> Batch:
    rng = np.random.default_rng(0)
    rows = [np.append(rng.integers(4, VOCAB, n - 1), EOS_ID) for n in lengths]
    batch = collate(Sequences.from_list(rows), np.arange(10, 10 + len(rows)))
    return batch if weights is None else dataclasses.replace(batch, weight_B=torch.tensor(weights))


def free_bits_of(nats: float) -> ObjectiveConfig:
    """Per example and dimension."""
    return ObjectiveConfig(free_bits="dimension", free_bits_nats=nats)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def by_hand(
    vae: TextVAE, batch: Batch, beta: float, scale: float, free_bits: float
) -> tuple[torch.Tensor, list[float], list[float]]:
    """The loss, and rec and KL of each sequence, from torch's own distributions and cross entropy."""
    posterior = posterior_of(vae, batch)
    kl_BD = kl_divergence(posterior, Normal(torch.zeros_like(posterior.loc), torch.ones_like(posterior.scale)))
    with torch.no_grad():
        noise = (vae(batch, RNG).latent.z[0] - posterior.loc) / posterior.scale
    z_BD = posterior.loc + posterior.scale * noise
    input_BT = F.pad(batch.tokens_BT[:, :-1], (1, 0), value=BOS_ID)
    hidden = vae.to_embedding(vae.decoder(vae.embedding(input_BT), z_BD, batch.lengths_B))
    logits = hidden @ vae.embedding.weight.T + vae.output_bias
    recs = [F.cross_entropy(o[:n], t[:n], reduction="sum") for o, t, n in zip(
        logits, batch.tokens_BT, batch.lengths_B.tolist(), strict=True)]  # fmt: skip
    counted_B = torch.maximum(kl_BD, torch.tensor(free_bits)).sum(-1) if free_bits else kl_BD.sum(-1)
    loss = scale * sum(
        w * (rec + beta * kl) for w, rec, kl in zip(batch.weight_B.tolist(), recs, counted_B, strict=True)
    )
    return loss, [float(r.detach()) for r in recs], kl_BD.sum(-1).tolist()


def posterior_of(vae: TextVAE, batch: Batch) -> Normal:
    mean_BD, logvar_BD = vae.encode(batch)
    return Normal(mean_BD, (logvar_BD / 2).exp())


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.35])
@pytest.mark.parametrize("free_bits", [0.0, 0.02])
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 2.0, 1.0]], ids=["equal", "weighted"])
def test_the_loss_and_its_gradient_against_torch(beta: float, free_bits: float, weights: list[float] | None) -> None:
    vae, batch = make_vae(), make_batch([5, 2, 7, 1], weights)
    expected, recs, kls = by_hand(vae, batch, beta, 0.25, free_bits)
    expected_gradients = torch.autograd.grad(expected, list(vae.parameters()))
    loss, terms = NegativeElbo(vae, free_bits_of(free_bits), None)(batch, RNG, scalar(beta), scalar(0.25))
    gradients = torch.autograd.grad(loss, list(vae.parameters()))
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-8)
    weight = batch.weight_B.numpy()
    assert float(terms.rec) == pytest.approx(weight @ recs)
    assert float(terms.kl) == pytest.approx(weight @ kls)


def test_free_bits_bite_and_raise_only_what_the_loss_counts() -> None:
    vae, batch = make_vae(), make_batch([5, 2])
    plain, floored = (
        NegativeElbo(vae, free_bits_of(f), None)(batch, RNG, scalar(1.0), scalar(1.0)) for f in (0.0, 0.5)
    )
    assert float(floored[1].kl_counted) == pytest.approx(2 * 4 * 0.5)
    assert float(floored[1].kl) == float(plain[1].kl) == float(plain[1].kl_counted) < 4.0
    assert float((floored[0] - plain[0]).detach()) == pytest.approx(float(floored[1].kl_counted - plain[1].kl))


def test_rows_of_weight_zero_give_no_gradient_and_no_metric() -> None:
    vae, batch = make_vae(), make_batch([5, 2], [0.0, 0.0])
    loss, terms = NegativeElbo(vae, free_bits_of(0.1), None)(batch, RNG, scalar(1.0), scalar(1.0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in vae.parameters())
    for name in ("rec", "kl", "kl_counted", "mean", "mean_square", "sequences", "tokens"):
        assert not getattr(terms, name).any(), name


def test_a_padding_batch_adds_nothing() -> None:
    vae, empty = make_vae(), collate(Sequences.concatenate([]), np.empty(0, dtype=np.int64))
    loss, terms = NegativeElbo(vae, free_bits_of(0.1), None)(empty, RNG, scalar(1.0), scalar(1.0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in vae.parameters())
    assert not any(term.any() for term in terms)


def test_terms_are_sums_over_the_real_sequences() -> None:
    vae, batch = make_vae(), make_batch([5, 2, 7])
    terms = NegativeElbo(vae, free_bits_of(0.0), None)(batch, RNG, scalar(1.0), scalar(0.1))[1]
    posterior = posterior_of(vae, batch)
    kl_BD = kl_divergence(posterior, Normal(scalar(0.0), scalar(1.0)))
    torch.testing.assert_close(terms.kl_per_dim, kl_BD.sum(0), check_dtype=False)
    torch.testing.assert_close(terms.mean, posterior.loc.sum(0))
    torch.testing.assert_close(terms.mean_square, posterior.loc.square().sum(0))
    assert (float(terms.sequences), float(terms.tokens)) == (3.0, 14.0)
    assert not any(term.requires_grad for term in terms)


def test_micro_batches_add_up_to_the_batch() -> None:
    vae = make_vae()
    objective, lengths = NegativeElbo(vae, free_bits_of(0.05), None), [5, 2, 7, 1, 3]
    whole = make_batch(lengths)
    loss, terms = objective(whole, RNG, scalar(0.5), scalar(0.2))
    gradients = torch.autograd.grad(loss, list(vae.parameters()))
    parts = []
    for rows in ([0, 1], [2], [3, 4]):
        tokens = [whole.tokens_BT[r, : whole.lengths_B[r]].numpy() for r in rows]
        parts.append(
            objective(collate(Sequences.from_list(tokens), np.array(rows) + 10), RNG, scalar(0.5), scalar(0.2))
        )
    summed = ElboTerms(*(sum(values) for values in zip(*(p[1] for p in parts), strict=True)))
    for name, value in terms._asdict().items():
        torch.testing.assert_close(getattr(summed, name), value, msg=name)
    torch.testing.assert_close(sum(p[0] for p in parts), loss)
    accumulated = torch.autograd.grad(sum(p[0] for p in parts), list(vae.parameters()))
    for got, wanted in zip(accumulated, gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-8)


def test_loss_scale_makes_the_average_over_ranks_the_mean_over_sequences() -> None:
    sums_of_ranks, real = [3.0, 5.0, 0.0, 4.0], 7
    average = sum(s * loss_scale(4, real) for s in sums_of_ranks) / 4
    assert average == pytest.approx(sum(sums_of_ranks) / real)


def test_bfloat16_is_near_float32() -> None:
    vae, batch = make_vae().float(), make_batch([5, 2, 7])
    one, scale = torch.tensor(1.0), torch.tensor(1 / 3)
    exact = NegativeElbo(vae, free_bits_of(0.0), None)(batch, RNG, one, scale)[0]
    rough = NegativeElbo(vae, free_bits_of(0.0), torch.bfloat16)(batch, RNG, one, scale)[0]
    assert rough.dtype == torch.float32
    assert math.isclose(float(rough.detach()), float(exact.detach()), rel_tol=0.02)
