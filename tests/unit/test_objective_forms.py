"""The forms of the objective beside the plain ELBO, against torch in fp64 on the same noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from vae_dist.config.model_schema import LstmConfig, ModelConfig
from vae_dist.config.objective_schema import CapacityControl, ObjectiveConfig
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import Batch, collate
from vae_dist.data.text.special_ids import BOS_ID, EOS_ID
from vae_dist.model.vae import TextVAE, VaeOutput
from vae_dist.objective.elbo import NegativeElbo

VOCAB, LATENT = 17, 3
RNG = torch.tensor([1, 2])
BETA, SCALE = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)


def make_vae() -> TextVAE:
    part = LstmConfig(hidden_dim=7)
    torch.manual_seed(0)
    vae = TextVAE(ModelConfig(embedding_dim=6, encoder=part, decoder=part, latent_dim=LATENT), VOCAB).double()
    with torch.no_grad():
        # Posteriors that differ, some dimensions above a floor and some below.
        vae.posterior.weight.mul_(4.0)
        vae.posterior.bias.copy_(torch.tensor([0.9, 0.0, -0.2, -1.0, 0.1, 0.0]))
    return vae


def make_batch(lengths: list[int], repeats: int = 1) -> Batch:
    rng = np.random.default_rng(0)
    rows = [np.append(rng.integers(4, VOCAB, n - 1), EOS_ID) for n in lengths] * repeats
    return collate(Sequences.from_list(rows), np.arange(len(rows)))


def rec_of(vae: TextVAE, batch: Batch, z_BD: torch.Tensor) -> torch.Tensor:
    """-log p(x | z) of each sequence, by torch's cross entropy."""
    input_BT = F.pad(batch.tokens_BT[:, :-1], (1, 0), value=BOS_ID)
    hidden = vae.to_embedding(vae.decoder(vae.embedding(input_BT), z_BD, batch.lengths_B))
    logits = hidden @ vae.embedding.weight.T + vae.output_bias
    rows = zip(logits, batch.tokens_BT, batch.lengths_B.tolist(), strict=True)
    return torch.stack([F.cross_entropy(o[:n], t[:n], reduction="sum") for o, t, n in rows])


def drawn(vae: TextVAE, batch: Batch, samples: int) -> tuple[Normal, torch.Tensor, torch.Tensor]:
    """The posterior, z [K, B, D] as a function of its parameters, and KL [B, D]."""
    mean, logvar = vae.encode(batch)
    posterior = Normal(mean, (logvar / 2).exp())
    with torch.no_grad():
        noise = (vae(batch, RNG, num_samples=samples).latent.z - mean) / posterior.scale
    return posterior, mean + posterior.scale * noise, torch.distributions.kl_divergence(posterior, Normal(0.0, 1.0))


def check(vae: TextVAE, batch: Batch, expected: torch.Tensor, objective: ObjectiveConfig, **extra: Any) -> None:
    """Loss and every gradient."""
    loss, _ = NegativeElbo(vae, objective, None)(batch, RNG, BETA, SCALE, **extra)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    parameters = list(vae.parameters())
    wanted, found = torch.autograd.grad(expected, parameters), torch.autograd.grad(loss, parameters)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)


# Four sequences and SCALE 1/4: the global batch is the batch.
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 3.0])
def test_free_bits_of_a_dimension_on_average_are_the_larger_of_floor_and_mean(floor: float) -> None:
    vae, batch = make_vae(), make_batch([5, 3, 6, 2])
    _, z, kl_BD = drawn(vae, batch, 1)
    expected = rec_of(vae, batch, z[0]).mean() + BETA * kl_BD.mean(0).clamp(min=floor).sum()
    check(vae, batch, expected, ObjectiveConfig(free_bits="batch_dimension", free_bits_nats=floor))


@pytest.mark.parametrize("floor", [0.3, 50.0])
@pytest.mark.parametrize("form", ["sequence", "batch_sequence"])
def test_free_bits_of_a_sequence_and_of_the_batch(form: str, floor: float) -> None:
    vae, batch = make_vae(), make_batch([5, 3, 6, 2])
    _, z, kl_BD = drawn(vae, batch, 1)
    kl_B = kl_BD.sum(-1)
    counted = kl_B.clamp(min=floor).mean() if form == "sequence" else kl_B.mean().clamp(min=floor)
    expected = rec_of(vae, batch, z[0]).mean() + BETA * counted
    check(vae, batch, expected, ObjectiveConfig(free_bits=form, free_bits_nats=floor))


@pytest.mark.parametrize("capacity", [0.1, 20.0])
def test_capacity_is_the_distance_of_the_mean_rate_from_it(capacity: float) -> None:
    vae, batch = make_vae(), make_batch([5, 3, 6, 2])
    _, z, kl_BD = drawn(vae, batch, 1)
    expected = rec_of(vae, batch, z[0]).mean() + BETA * (kl_BD.sum(-1).mean() - capacity).abs()
    objective = ObjectiveConfig(free_bits="none", rate_control=CapacityControl(nats=capacity))
    check(vae, batch, expected, objective, capacity=torch.tensor(capacity, dtype=torch.float64))


def test_the_entropy_term_is_the_posteriors_entropy() -> None:
    vae, batch = make_vae(), make_batch([5, 3, 6, 2])
    posterior, z, kl_BD = drawn(vae, batch, 1)
    entropy = posterior.entropy().sum(-1).mean()
    expected = rec_of(vae, batch, z[0]).mean() + BETA * kl_BD.sum(-1).mean() - 0.3 * entropy
    check(vae, batch, expected, ObjectiveConfig(free_bits="none", entropy_weight=0.3))


def importance_weighted(vae: TextVAE, batch: Batch, samples: int) -> torch.Tensor:
    posterior, z_KBD, _ = drawn(vae, batch, samples)
    log_ratio = Normal(0.0, 1.0).log_prob(z_KBD).sum(-1) - posterior.log_prob(z_KBD).sum(-1)
    log_weight_KB = BETA * log_ratio - torch.stack([rec_of(vae, batch, z_BD) for z_BD in z_KBD])
    return -(torch.logsumexp(log_weight_KB, 0) - math.log(samples)).mean()


def test_the_importance_weighted_bound_and_its_own_gradient() -> None:
    vae, batch = make_vae(), make_batch([5, 3, 6, 2])
    objective = ObjectiveConfig(free_bits="none", importance_samples=4, estimator="iwae")
    check(vae, batch, importance_weighted(vae, batch, 4), objective)


def test_one_importance_sample_is_the_elbo() -> None:
    vae, batch = make_vae(), make_batch([4, 4])
    output: VaeOutput = vae(batch, RNG)
    bound = output.latent.log_p - output.latent.log_q - output.rec_KB
    _, z, _ = drawn(vae, batch, 1)
    assert torch.allclose(-bound[0], rec_of(vae, batch, z[0]) - (output.latent.log_p - output.latent.log_q)[0])


def gradients(vae: TextVAE, estimator: str, samples: int, beta: float, repeats: int) -> dict[str, torch.Tensor]:
    """Gradients of `repeats` independent draws for one sentence, [repeats, parameters] by group."""
    batch = make_batch([4])
    objective = NegativeElbo(
        vae, ObjectiveConfig(free_bits="none", importance_samples=samples, estimator=estimator), None
    )
    encoder = [p for n, p in vae.named_parameters() if n.startswith(("encoder", "posterior"))]
    decoder = [p for n, p in vae.named_parameters() if n.startswith(("decoder", "to_embedding", "output"))]
    found: dict[str, list[torch.Tensor]] = {"encoder": [], "decoder": []}
    for draw in range(repeats):
        rng = torch.tensor([7, draw])
        loss, _ = objective(batch, rng, torch.tensor(beta, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
        parts = torch.autograd.grad(loss, [*encoder, *decoder])
        found["encoder"].append(torch.cat([g.flatten() for g in parts[: len(encoder)]]))
        found["decoder"].append(torch.cat([g.flatten() for g in parts[len(encoder) :]]))
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.long
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_doubly_reparameterised_gradient_is_unbiased_and_has_less_variance(beta: float) -> None:
    vae, repeats = make_vae(), 300
    with torch.no_grad():
        # A posterior near the optimum, which is where training spends its time: there both parts of DReG vanish.
        vae.posterior.weight.mul_(0.02)
        vae.posterior.bias.copy_(torch.tensor([0.2, 0.0, -0.1, 0.1, 0.0, 0.0]))
        vae.decoder.to_input.weight.mul_(0.1)
        vae.decoder.to_cell.weight.mul_(0.1)
    own, doubly = (gradients(vae, name, 32, beta, repeats) for name in ("iwae", "dreg"))
    # The decoder's gradient is the same number for the same draw.
    torch.testing.assert_close(own["decoder"], doubly["decoder"], atol=1e-9, rtol=1e-7)
    difference = own["encoder"].mean(0) - doubly["encoder"].mean(0)
    error = ((own["encoder"] - doubly["encoder"]).var(0) / repeats).sqrt()
    assert (difference.abs() <= 5.0 * error + 1e-9).all()
    if beta == 1.0:
        assert doubly["encoder"].var(0).sum() < 0.3 * own["encoder"].var(0).sum()
