"""Evaluation against closed forms: a linear Gaussian model whose marginal likelihood is known exactly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from vae_dist.config.model_schema import ModelConfig
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import Batch
from vae_dist.data.text.special_ids import EOS_ID
from vae_dist.evaluate.latent import active_units, kl_per_dim, mutual_information, variance_of_mean
from vae_dist.evaluate.likelihood import Scores, score_split, summarise, swapped_rec_per_seq
from vae_dist.model.vae import VaeOutput
from vae_kernels import gaussian_rsample_kl

LATENT, NOISE = 3, 0.8


def test_kl_per_dim_is_torchs() -> None:
    rng = np.random.default_rng(0)
    mean, logvar = rng.normal(size=(50, 4)).astype(np.float32), rng.normal(size=(50, 4)).astype(np.float32)
    posterior = torch.distributions.Normal(torch.tensor(mean).double(), torch.tensor(logvar).double().div(2).exp())
    prior = torch.distributions.Normal(torch.zeros(50, 4).double(), torch.ones(50, 4).double())
    expected = torch.distributions.kl_divergence(posterior, prior).mean(0)
    np.testing.assert_allclose(kl_per_dim(mean, logvar), expected, rtol=1e-12)


def test_active_units_count_dimensions_whose_mean_moves() -> None:
    # Variances of two values a apart, divided by n - 1: a^2 / 2.
    mean = np.array([[0.0, 0.0, 5.0, 0.0], [0.1, 0.142, 5.0, 2.0]], dtype=np.float32)
    np.testing.assert_allclose(variance_of_mean(mean), [0.005, 0.010082, 0.0, 2.0], rtol=1e-5)
    assert active_units(mean) == 2
    assert active_units(mean, threshold=0.004) == 3
    assert active_units(mean[:1]) == 0


def slow_mutual_information(mean: np.ndarray, logvar: np.ndarray, z: np.ndarray) -> float:
    total = 0.0
    for i in range(len(mean)):
        densities = [stats.norm.logpdf(z[i], mean[j], np.exp(logvar[j] / 2)).sum() for j in range(len(mean))]
        top = max(densities)
        log_marginal = top + math.log(sum(math.exp(d - top) for d in densities) / len(mean))
        entropy = stats.norm.entropy(mean[i], np.exp(logvar[i] / 2)).sum()
        total += -entropy - log_marginal
    return total / len(mean)


@pytest.mark.parametrize("count", [1, 7, 40])
def test_mutual_information_is_the_double_loop(count: int) -> None:
    rng = np.random.default_rng(count)
    mean, logvar = 2 * rng.normal(size=(count, LATENT)), rng.normal(size=(count, LATENT)) - 1
    z = mean + np.exp(logvar / 2) * rng.normal(size=mean.shape)
    inputs = [a.astype(np.float32) for a in (mean, logvar, z)]
    assert mutual_information(*inputs) == pytest.approx(slow_mutual_information(*map(np.float64, inputs)), abs=1e-8)


def test_mutual_information_of_a_collapsed_posterior_is_zero() -> None:
    zeros = np.zeros((2000, 8), dtype=np.float32)
    z = np.random.default_rng(0).normal(size=zeros.shape).astype(np.float32)
    # The standard error of a mean of 2000 draws of -log q with variance 8 / 2.
    assert abs(mutual_information(zeros, zeros, z)) < 5 * 2 / 2000**0.5


def test_mutual_information_of_separate_posteriors_is_log_n() -> None:
    rng = np.random.default_rng(0)
    mean = (100.0 * np.arange(500)[:, None]).astype(np.float32)
    logvar = np.zeros_like(mean)
    z = mean + rng.normal(size=mean.shape).astype(np.float32)
    # What is left is the difference of the analytic and the sampled entropy: variance 1 / 2 a draw.
    assert mutual_information(mean, logvar, z) == pytest.approx(math.log(500), abs=5 * (0.5 / 500) ** 0.5)


def test_mutual_information_survives_tight_posteriors_far_out() -> None:
    mean = np.array([[1000.0], [-1000.0]], dtype=np.float32)
    logvar = np.full_like(mean, -12.0)
    assert mutual_information(mean, logvar, mean) == pytest.approx(math.log(2) - 0.5, abs=1e-4)


class ArraySplit:
    """A split in memory."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self._all = Sequences.from_list(rows)
        self.sequences, self.tokens = len(rows), int(self._all.lengths.sum())

    def read(self, first: int, count: int) -> Sequences:
        return self._all.take(np.arange(first, first + count))


class LinearGaussian(nn.Module):
    """A VAE over real numbers that stand for tokens: z ~ N(0, I), y_t = a_t . z + noise, y_t = token / 10.

    The marginal of y is N(0, A A' + s^2 I) and the true posterior is Gaussian with a full covariance, so that the
    diagonal q below leaves a gap that is known too.
    """

    config, per_token, latent_dim = ModelConfig(), False, LATENT

    def __init__(self, longest: int = 12) -> None:
        super().__init__()
        self.register_parameter(
            "a", nn.Parameter(torch.randn(longest, LATENT, generator=torch.manual_seed(0)).double())
        )
        self.calls: list[tuple[np.ndarray, torch.Tensor | None]] = []
        self.modes: list[bool] = []
        self.encodings = 0

    def posterior(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(matrix from y to the mean of z, diagonal log-variance); a little off the optimum on purpose."""
        a = self.a[:length].detach()
        covariance = torch.linalg.inv(torch.eye(LATENT).double() + a.T @ a / NOISE**2)
        return 0.9 * covariance @ a.T / NOISE**2, covariance.diagonal().log() + 0.2

    def forward(
        self,
        batch: Batch,
        rng: torch.Tensor,
        *,
        num_samples: int = 1,
        stream: int = 0,
        z: Any = None,
        fitted_prior: bool = False,
        posterior_rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> VaeOutput:
        y_BT = batch.tokens_BT.double() / 10
        mean, logvar = posterior_rows or self.encoded(batch)
        latent = gaussian_rsample_kl(mean, logvar, rng, batch.sample_id_B, num_samples=num_samples, stream=stream)
        self.calls.append((batch.sample_id_B.numpy(), z))
        self.modes.append(self.training)
        z_KBD = latent.z if z is None else z.double()[None]
        expected_KBT = z_KBD @ self.a[: y_BT.shape[1]].T
        density = torch.distributions.Normal(expected_KBT, NOISE).log_prob(y_BT)
        real_BT = torch.arange(y_BT.shape[1]) < batch.lengths_B[:, None]
        rec_KB = -(density * real_BT).sum(-1)
        return VaeOutput(rec_KB[0].sum(), rec_KB, latent, mean, logvar)

    def encoded(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.encodings += 1
        y_BT = batch.tokens_BT.double() / 10
        parameters = [self.posterior(int(n)) for n in batch.lengths_B]
        mean = torch.stack([m @ y[:n] for (m, _), y, n in zip(parameters, y_BT, batch.lengths_B, strict=True)])
        return mean, torch.stack([v for _, v in parameters])

    def log_marginal(self, tokens: np.ndarray) -> float:
        a = self.a[: len(tokens)].detach().numpy()
        covariance = a @ a.T + NOISE**2 * np.eye(len(tokens))
        return float(stats.multivariate_normal.logpdf(tokens / 10, np.zeros(len(tokens)), covariance))

    def elbo(self, tokens: np.ndarray) -> tuple[float, float]:
        """(E_q[-log p(y | z)], KL), both in closed form."""
        a, y = self.a[: len(tokens)].detach().numpy(), tokens / 10
        matrix, logvar = (t.numpy() for t in self.posterior(len(tokens)))
        mean, variance = matrix @ y, np.exp(logvar)
        spread = ((y - a @ mean) ** 2 + (a**2) @ variance).sum()
        rec = 0.5 * len(y) * math.log(2 * math.pi * NOISE**2) + spread / (2 * NOISE**2)
        return rec, 0.5 * (mean**2 + variance - logvar - 1).sum()


def some_rows(count: int, longest: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [np.append(rng.integers(3, 30, n - 1), EOS_ID) for n in rng.integers(2, longest + 1, count)]


def score(vae: nn.Module, split: ArraySplit, **options: Any) -> Scores:
    scores = score_split(vae, split, **({"seed": 0, "batch_sequences": 64} | options))  # type: ignore[arg-type]
    assert scores is not None
    return scores


def repeated(tokens: np.ndarray, times: int) -> ArraySplit:
    """The same sequence many times: as many independent estimates."""
    return ArraySplit([tokens] * times)


TOKENS = np.array([7, 12, 25, 3, 18, EOS_ID])


def test_the_single_sample_elbo_is_unbiased() -> None:
    vae = LinearGaussian()
    scores, (rec, kl) = score(vae, repeated(TOKENS, 4000)), vae.elbo(TOKENS)
    assert scores.rec.mean() == pytest.approx(rec, abs=5 * scores.rec.std() / 4000**0.5)
    np.testing.assert_allclose(scores.kl, kl, rtol=1e-6)
    assert np.isnan(scores.iw_log_likelihood).all()


def test_the_importance_weighted_bound_with_one_sample_averages_to_the_elbo() -> None:
    vae = LinearGaussian()
    bound = score(vae, repeated(TOKENS, 4000), importance_samples=1).iw_log_likelihood
    assert bound.mean() == pytest.approx(-sum(vae.elbo(TOKENS)), abs=5 * bound.std() / 4000**0.5)


def test_the_importance_weighted_bound_rises_to_the_marginal_likelihood() -> None:
    vae = LinearGaussian()
    means, errors = [], []
    for samples, times in ((1, 2000), (5, 1000), (25, 500), (4000, 12)):
        bound = score(vae, repeated(TOKENS, times), importance_samples=samples).iw_log_likelihood
        means.append(bound.mean())
        errors.append(bound.std() / times**0.5)
    assert means[0] < means[1] - 3 * errors[0] < means[2] - 3 * errors[1]
    exact = vae.log_marginal(TOKENS)
    assert -sum(vae.elbo(TOKENS)) < exact - 0.05
    assert means[3] == pytest.approx(exact, abs=0.01 + 5 * errors[3])
    assert all(mean < exact + 5 * error for mean, error in zip(means, errors, strict=True))


def test_a_batch_is_encoded_once_for_all_its_samples() -> None:
    model = LinearGaussian()
    score(model, ArraySplit(some_rows(20)), batch_sequences=10, importance_samples=45)
    assert (model.encodings, len(model.calls)) == (2, 10)


def test_importance_samples_also_average_the_reconstruction() -> None:
    vae, split = LinearGaussian(), repeated(TOKENS, 200)
    rec, _ = vae.elbo(TOKENS)
    many = score(vae, split, importance_samples=50).rec
    assert many.std() < 0.3 * score(vae, split).rec.std()
    assert many.mean() == pytest.approx(rec, abs=5 * many.std() / 200**0.5)


def test_every_sequence_is_scored_with_its_own_marginal() -> None:
    vae, rows = LinearGaussian(), some_rows(40)
    scores = score(vae, ArraySplit(rows), importance_samples=1500)
    exact = [vae.log_marginal(row) for row in rows]
    np.testing.assert_allclose(scores.iw_log_likelihood, exact, atol=0.25)
    assert scores.number.tolist() == list(range(40))
    assert scores.tokens.tolist() == [len(row) for row in rows]


def test_a_split_longer_than_a_window_is_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, split = LinearGaussian(), ArraySplit(some_rows(101))
    whole = score(vae, split)
    swapped = swapped_rec_per_seq(vae, split, whole, seed=0, batch_sequences=8)  # type: ignore[arg-type]
    monkeypatch.setattr("vae_dist.evaluate.likelihood._WINDOW_SEQUENCES", 25)
    pieces = score(vae, split)
    assert pieces.number.tolist() == list(range(101))
    np.testing.assert_allclose(pieces.rec, whole.rec, rtol=1e-9)
    assert swapped_rec_per_seq(vae, split, whole, seed=0, batch_sequences=8) == pytest.approx(swapped)  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [0, 7])
def test_results_do_not_depend_on_the_batch_size(samples: int) -> None:
    vae, split = LinearGaussian(), ArraySplit(some_rows(101))
    reference = score(vae, split, importance_samples=samples, batch_sequences=101)
    for batch_sequences in (1, 8, 64):
        other = score(vae, split, importance_samples=samples, batch_sequences=batch_sequences)
        for field in dataclasses.fields(Scores)[:-2]:
            got, wanted = getattr(other, field.name), getattr(reference, field.name)
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6, err_msg=field.name)


def test_ranks_share_the_batches_without_overlap() -> None:
    # What each rank would score, without the collective that joins them.
    from vae_dist.evaluate.likelihood import split_batches

    split = ArraySplit(some_rows(70))
    for world in (2, 4):
        rounds = [list(split_batches(split, 0, 16, None, rank, world)) for rank in range(world)]  # type: ignore[arg-type]
        assert len({len(batches) for batches in rounds}) == 1
        numbers = [int(n) for batches in rounds for part, _ in batches for n in part]
        assert sorted(numbers) == list(range(70))
        empty = [batch for batches in rounds for part, batch in batches if len(part) == 0]
        assert len(empty) == len(rounds) * len(rounds[0]) - 5
        assert all(batch.weight_B.tolist() == [0.0] for batch in empty)


def test_max_sequences_takes_a_random_subset_of_whole_scores() -> None:
    vae, split = LinearGaussian(), ArraySplit(some_rows(200))
    full = score(vae, split)
    part, other = (score(vae, split, max_sequences=50, seed=seed) for seed in (0, 1))
    assert len(set(part.number.tolist())) == 50
    assert set(part.number) != set(other.number)
    assert part.number.max() > 100
    np.testing.assert_allclose(part.rec, full.rec[part.number], rtol=1e-9)


def test_scoring_runs_in_eval_mode_and_restores_the_mode() -> None:
    vae = LinearGaussian()
    for training in (True, False):
        vae.train(training)
        score(vae, ArraySplit(some_rows(5)))
        assert vae.training is training
    assert not any(vae.modes)


def test_the_seed_moves_the_noise_and_nothing_else() -> None:
    vae, split = LinearGaussian(), ArraySplit(some_rows(20))
    first, second = score(vae, split, seed=1), score(vae, split, seed=2)
    np.testing.assert_array_equal(first.kl, second.kl)
    assert (first.rec != second.rec).all()


def test_the_summary_is_the_sum_over_tokens_and_sequences() -> None:
    vae, rows = LinearGaussian(), some_rows(33)
    split = ArraySplit(rows)
    scores = score(vae, split, importance_samples=20)
    summary = summarise(scores)
    assert summary["tokens"] == split.tokens == sum(map(len, rows))
    assert summary["sequences"] == 33
    total = float(scores.rec.sum() + scores.kl.sum())
    assert summary["elbo_per_seq"] == pytest.approx(-total / 33)
    assert summary["nll_per_token"] == pytest.approx(total / split.tokens)
    assert summary["ppl"] == pytest.approx(math.exp(total / split.tokens))
    iw = -float(scores.iw_log_likelihood.sum())
    assert summary["iw_nll_per_seq"] == pytest.approx(iw / 33)
    assert summary["iw_ppl"] == pytest.approx(math.exp(iw / split.tokens))
    assert summary["iw_nll_per_seq"] < -summary["elbo_per_seq"]
    assert sum(summary["kl_per_dim"]) == pytest.approx(summary["kl_per_seq"], rel=1e-5)
    assert summary["active_units"] == active_units(scores.mean)
    assert summary["mutual_information_nats"] == mutual_information(scores.mean, scores.logvar, scores.z)


def test_the_summary_without_importance_samples_or_with_a_diverged_model() -> None:
    scores = score(LinearGaussian(), ArraySplit(some_rows(5)))
    assert "iw_ppl" not in summarise(scores)
    assert summarise(dataclasses.replace(scores, rec=scores.rec + 1e6))["ppl"] == math.inf


@pytest.mark.parametrize("count", [2, 3, 64, 101])
def test_no_sequence_keeps_its_own_latent_when_they_are_swapped(count: int) -> None:
    vae, split = LinearGaussian(), ArraySplit(some_rows(count))
    scores = score(vae, split)
    vae.calls.clear()
    swapped = swapped_rec_per_seq(vae, split, scores, seed=0, batch_sequences=16)  # type: ignore[arg-type]
    source_of = {tuple(z): number for number, z in enumerate(scores.z)}
    pairs = {int(n): source_of[tuple(z.numpy())] for ids, z_BD in vae.calls for n, z in zip(ids, z_BD, strict=True)}
    assert sorted(pairs) == sorted(pairs.values()) == list(range(count))
    assert all(number != source for number, source in pairs.items())
    if count > 10:
        assert swapped > scores.rec.mean()


def test_swapping_on_a_subset_averages_over_the_subset() -> None:
    vae, split = LinearGaussian(), ArraySplit(some_rows(200))
    scores = score(vae, split, max_sequences=60)
    vae.calls.clear()
    swapped = swapped_rec_per_seq(vae, split, scores, seed=0, batch_sequences=16)  # type: ignore[arg-type]
    assert sorted(int(n) for ids, _ in vae.calls for n in ids) == scores.number.tolist()
    by_hand = []
    for ids, z_BD in vae.calls:
        by_hand += [-density(vae, split.read(int(n), 1)[0], z) for n, z in zip(ids, z_BD, strict=True)]
    assert swapped == pytest.approx(np.mean(by_hand), rel=1e-6)


def density(vae: LinearGaussian, tokens: np.ndarray, z: torch.Tensor) -> float:
    expected = (vae.a[: len(tokens)].detach() @ z.double()).numpy()
    return float(stats.norm.logpdf(tokens / 10, expected, NOISE).sum())


def test_swapping_runs_in_eval_mode() -> None:
    vae, split = LinearGaussian().train(), ArraySplit(some_rows(9))
    scores = score(vae, split)
    swapped_rec_per_seq(vae, split, scores, seed=0, batch_sequences=4)  # type: ignore[arg-type]
    assert not any(vae.modes)
    assert vae.training
