"""Every option of the objective and the latent, trained for 300 steps beside a control run without it.

Each run's distinguishing quantity is compared with theory. The corpus has 8.4 nats of entropy a sentence that a decoder
can as well do without z, so without a remedy the posterior collapses.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import train_in_one_process

from vae_dist.config.load import load_config
from vae_dist.data.store.dataset import Dataset
from vae_dist.evaluate.likelihood import Scores, score_split
from vae_dist.model.vae import TextVAE
from vae_dist.model.vmf import VonMisesFisher
from vae_dist.objective.schedule import beta_at
from vae_dist.observe.metrics import read_metrics

pytestmark = pytest.mark.long

STEPS, LATENT = 300, 4
COMMON = (
    "model.embedding_dim=16",
    # Reads the words at once; a recurrent encoder would need thousands of steps to begin to inform the decoder.
    "model.encoder={kind: bag_of_words}",
    "model.decoder={hidden_dim: 24}",
    f"model.latent_dim={LATENT}",
    "objective.free_bits=none",
    "objective.annealing.fraction=0.0",
    "optimizer.learning_rate=0.01",
    "optimizer.warmup_steps=5",
    f"train.steps={STEPS}",
    "train.batch_sequences=32",
    "train.precision=fp32",
    "data.length_groups=8",
    "run.log_every_steps=10",
    "evaluate.every_steps=50",
    "run.checkpoint_every_steps=300",
)
QUICK: dict[str, list[str]] = {
    "control": [],
    "per-dimension": ["objective.free_bits=dimension", "objective.free_bits_nats=0.5"],
    "mdr": ["objective.rate_control={kind: mdr, nats: 2, learning_rate: 0.005}"],
    "pretrained": [
        "objective.autoencoder_fraction=0.4",
        "objective.reset_decoder=true",
        "objective.free_bits=dimension",
        "objective.free_bits_nats=0.5",
    ],
    "sphere": ["model.posterior={kind: vmf, kappa: 15}"],
    "language-model": ["model.latent=none"],
}
LONG: dict[str, list[str]] = {
    "linear": ["objective.annealing={kind: linear, fraction: 0.9}"],
    "logistic": ["objective.annealing={kind: logistic, midpoint: 0.5}"],
    "cyclical": ["objective.annealing={kind: cyclical, cycles: 2, ramp: 0.9}"],
    "zero-linear": ["objective.annealing={kind: zero_linear, zero: 0.6, ramp: 0.2}"],
    "beta": ["objective.beta=0.1"],
    "per-sequence": ["objective.free_bits=sequence", "objective.free_bits_nats=2.5"],
    "batch-dimension": ["objective.free_bits=batch_dimension", "objective.free_bits_nats=0.5"],
    "batch-sequence": ["objective.free_bits=batch_sequence", "objective.free_bits_nats=2.5"],
    "capacity": ["objective.rate_control={kind: capacity, nats: 3}", "objective.beta=5.0"],
    "control-vae": [
        "objective.annealing={kind: linear}",
        "objective.rate_control={kind: control_vae, nats: 3, kp: 0.1, ki: 0.01}",
    ],
    "aggressive": ["objective.aggressive={max_encoder_steps: 3, check_steps: 1, max_fraction: 1.0}"],
    "word-dropout": ["model.word_dropout=0.5", "objective.beta=0.1"],
    "batch-norm": ["model.posterior.batch_norm_gamma=0.7"],
    "delta": ["model.posterior={kind: delta, nats_per_dim: 0.4}"],
    "iwae": ["objective.importance_samples=8", "objective.estimator=iwae"],
    "dreg": ["objective.importance_samples=8", "objective.estimator=dreg"],
    "entropy": ["objective.beta=0.1", "objective.entropy_weight=0.5"],
    "mixture": ["objective.beta=0.1", "model.prior={kind: mixture, components: 6}"],
    "vamp": ["objective.beta=0.1", "model.prior={kind: vamp, components: 6, pseudo_tokens: 4}"],
    "flow": ["objective.beta=0.1", "model.prior={kind: flow, hidden_dim: 16}"],
    "fitted": ["objective.beta=0.1", "model.sampling_components=8"],
    "token": [
        "model.latent=token",
        "model.injection=embedding",
        "model.teacher_forcing=false",
        "model.encoder={hidden_dim: 24}",
        "model.bidirectional=true",
        "objective.beta=0.3",
    ],
    "repeated-z": ["model.teacher_forcing=false", "objective.beta=0.05"],
    "bag-of-words": ["model.decoder={kind: bag_of_words}", "objective.beta=0.3"],
    "best": ["evaluate.select=best", "optimizer.average_decay=0.95", "optimizer.learning_rate=0.03"],
    "plateau": [
        "optimizer.kind=sgd",
        "optimizer.learning_rate=2.0",
        "optimizer.schedule=plateau",
        "optimizer.plateau={patience: 1, first_validation: 2, max_reductions: 2}",
        "evaluate.every_steps=10",
    ],
}


class Run:
    """A finished run: its metrics, and its model on the validation split."""

    def __init__(self, directory: Path, dataset: Dataset, overrides: list[str]) -> None:
        self.directory, self.dataset = directory, dataset
        self.config = load_config(None, [*COMMON, *overrides])
        self.records = read_metrics(directory)

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    @property
    def valid(self) -> dict[str, Any]:
        return self.kind("valid")[-1]

    def curve(self, key: str) -> np.ndarray:
        return np.array([record[key] for record in self.kind("train")])

    @cached_property
    def vae(self) -> TextVAE:
        vae = TextVAE(self.config.model, self.dataset.tokenizer.vocab_size)
        weights = torch.load(self.directory / "weights.pt", weights_only=True)
        vae.load_state_dict({name.removeprefix("vae."): value for name, value in weights.items()})
        return vae.eval()

    def scores(self, **options: Any) -> Scores:
        found = score_split(self.vae, self.dataset.split("valid"), seed=0, batch_sequences=64, **options)
        assert found is not None
        return found


class Runs(dict[str, Run]):
    """Runs by name, trained together the first time one is asked for."""

    def __init__(self, data: Path, storage: Path, cases: dict[str, list[str]]) -> None:
        super().__init__()
        train_in_one_process(data, storage, {name: [*COMMON, *overrides] for name, overrides in cases.items()})
        dataset = Dataset.open(data)
        for name, overrides in cases.items():
            self[name] = Run(storage / name, dataset, overrides)


@pytest.fixture(scope="module")
def quick(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(dataset_dir, tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def long(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(dataset_dir, tmp_path_factory.mktemp("long"), LONG)


def tail(curve: np.ndarray) -> float:
    """Mean of the last fifty steps."""
    return float(curve[-5:].mean())


def test_without_a_remedy_the_posterior_collapses_and_it_is_said(quick: Runs) -> None:
    control = quick["control"]
    assert tail(control.curve("kl_per_seq")) < 0.1
    assert control.valid["mutual_information_nats"] < 0.1
    warnings = [e["message"] for e in control.kind("event") if "collapsed" in e["message"]]
    assert len(warnings) == 1 and "objective.free_bits=dimension" in warnings[0]


def test_free_bits_of_a_dimension_hold_every_dimension_at_its_floor(quick: Runs) -> None:
    run = quick["per-dimension"]
    assert (run.curve("kl_counted_per_seq") >= LATENT * 0.5 - 1e-4).all()
    # Nothing draws a dimension further down than its floor; where there is none, all of them go to zero.
    assert (np.array(run.kind("train")[-1]["kl_per_dim"]) > 0.3).all()
    assert (np.array(quick["control"].kind("train")[-1]["kl_per_dim"]) < 0.1).all()


def test_the_minimum_desired_rate_is_reached_from_below_zero_weight(quick: Runs) -> None:
    run = quick["mdr"]
    assert run.curve("kl_per_seq")[-10:].mean() > 2.0
    # The constraint binds: its multiplier took the KL's weight below beta = 1.
    assert run.curve("beta")[-10:].mean() < 0.9
    assert (quick["control"].curve("beta") == 1.0).all()


def test_pretraining_an_autoencoder_then_a_new_decoder(quick: Runs) -> None:
    run, boundary = quick["pretrained"], round(0.4 * STEPS)
    beta, steps = run.curve("beta"), run.curve("step")
    assert (beta[steps <= boundary] == 0.0).all() and (beta[steps > boundary] == 1.0).all()
    rec = dict(zip(steps.tolist(), run.curve("rec_per_seq"), strict=True))
    # The decoder began again: what it had learned is gone, and comes back.
    assert rec[boundary + 10] > rec[boundary] + 5.0 > rec[STEPS]
    rates = dict(zip(steps.tolist(), run.curve("learning_rate"), strict=True))
    assert rates[boundary + 10] > 2.0 * rates[boundary]
    # Some of the autoencoder's information survives; the control run has none.
    assert run.valid["mutual_information_nats"] > quick["control"].valid["mutual_information_nats"] + 0.15
    assert run.curve("kl_per_seq")[steps <= boundary].max() > 2.0


def test_the_rate_of_a_von_mises_fisher_posterior_is_its_constant(quick: Runs) -> None:
    run, law = quick["sphere"], VonMisesFisher(LATENT, 15.0)
    np.testing.assert_allclose(run.curve("kl_per_seq"), law.kl, rtol=1e-5)
    assert 0.5 < run.valid["mutual_information_nats"] < law.kl
    assert quick["control"].valid["mutual_information_nats"] < 0.1


def test_a_language_model_has_no_latent_and_the_decoder_of_the_vae(quick: Runs) -> None:
    run, control = quick["language-model"], quick["control"]
    assert run.valid["kl_per_seq"] == 0.0 and run.valid["active_units"] == 0
    assert run.vae.encoder is None and run.vae.latent_dim == 0
    # A collapsed VAE is a language model that pays for its latent.
    assert run.valid["rec_per_seq"] < -control.valid["elbo_per_seq"] + 0.5
    assert run.valid["rec_per_seq"] > math.log(4500) - 0.5
    own = dict(run.vae.named_parameters())
    shared = {
        name for name, _ in control.vae.named_parameters() if name.startswith(("decoder.lstm", "embedding", "out"))
    }
    assert shared <= own.keys()


@pytest.mark.parametrize("name", ["linear", "logistic", "cyclical", "zero-linear"])
def test_beta_follows_its_schedule_and_the_rate_falls_as_it_rises(long: Runs, name: str) -> None:
    run = long[name]
    beta, kl = run.curve("beta"), run.curve("kl_per_seq")
    expected = [beta_at(step - 1, STEPS, run.config.objective) for step in run.curve("step").astype(int)]
    np.testing.assert_allclose(beta, expected, rtol=1e-6)
    assert kl[beta < 0.4].mean() > kl[beta > 0.9].mean() + 0.15


def test_a_small_beta_buys_rate_and_information(long: Runs, quick: Runs) -> None:
    assert tail(long["beta"].curve("kl_per_seq")) > tail(quick["control"].curve("kl_per_seq")) + 1.0
    assert long["beta"].valid["mutual_information_nats"] > 0.5


@pytest.mark.parametrize(("name", "floor"), [("per-sequence", 2.5), ("batch-dimension", 2.0), ("batch-sequence", 2.5)])
def test_free_bits_keep_the_rate_at_their_floor(long: Runs, name: str, floor: float) -> None:
    run = long[name]
    assert tail(run.curve("kl_per_seq")) == pytest.approx(floor, rel=0.25)
    assert (run.curve("kl_counted_per_seq") >= floor - 1e-4).all()


@pytest.mark.parametrize("name", ["capacity", "control-vae"])
def test_a_rate_is_held_at_its_set_point(long: Runs, name: str) -> None:
    assert long[name].curve("kl_per_seq")[-10:].mean() == pytest.approx(3.0, abs=0.3)


def test_an_aggressive_encoder_takes_turns_and_informs_more(long: Runs, quick: Runs) -> None:
    aggressive, control = long["aggressive"], quick["control"]
    assert aggressive.curve("kl_per_seq")[5:20].mean() > control.curve("kl_per_seq")[5:20].mean() + 0.1
    # Most steps move the encoder alone, so the decoder has learned less.
    assert aggressive.valid["rec_per_seq"] > control.valid["rec_per_seq"] + 2.0


def test_words_are_dropped_in_training_only_and_cost_likelihood(long: Runs) -> None:
    run = long["word-dropout"]
    assert tail(run.curve("rec_per_seq")) > run.valid["rec_per_seq"] + 0.7
    assert run.valid["rec_per_seq"] > long["beta"].valid["rec_per_seq"] + 3.0


def test_normalised_means_keep_the_rate_above_their_bound(long: Runs) -> None:
    run = long["batch-norm"]
    assert (run.curve("kl_per_seq") >= LATENT * 0.7**2 / 2 - 1e-3).all()
    assert run.valid["active_units"] == LATENT
    # The running statistics that were exported are those of the data: the validation means have scale gamma.
    assert np.sqrt(run.scores().mean.var(axis=0)) == pytest.approx(0.7, rel=0.2)


def test_every_dimension_of_a_delta_vae_keeps_its_committed_rate(long: Runs) -> None:
    run = long["delta"]
    assert (np.array([r["kl_per_dim"] for r in run.kind("train")]) >= 0.4 - 1e-4).all()
    assert (np.array(run.valid["kl_per_dim"]) >= 0.4 - 1e-4).all()


@pytest.mark.parametrize("name", ["iwae", "dreg"])
def test_the_importance_weighted_objective_trains_its_bound(long: Runs, quick: Runs, name: str) -> None:
    bounds = [r.scores(importance_samples=8).iw_log_likelihood.mean() for r in (long[name], quick["control"])]
    assert bounds[0] > bounds[1] - 0.5
    # It asks less of each sample than the ELBO, so the posterior keeps more of its rate.
    assert long[name].curve("kl_per_seq").max() > quick["control"].curve("kl_per_seq").max() + 0.1


def test_the_entropy_term_widens_the_posterior(long: Runs) -> None:
    assert long["entropy"].scores().logvar.mean() > long["beta"].scores().logvar.mean() + 0.5


@pytest.mark.parametrize("name", ["mixture", "vamp", "flow"])
def test_a_learned_prior_fits_the_latents_better_than_the_standard_one(long: Runs, name: str) -> None:
    run = long[name]
    z = torch.from_numpy(run.scores().z)
    with torch.no_grad():
        learned = run.vae.prior(z, run.vae.encode_embeddings).double().mean()
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).sum(-1).mean()
    assert learned > standard + 0.05
    assert run.valid["mutual_information_nats"] > 0.25
    assert "kl_per_dim" not in run.valid


def test_the_fitted_mixture_fits_and_is_saved_with_the_model(long: Runs) -> None:
    run = long["fitted"]
    (fit,) = run.kind("fit")
    assert fit["mixture_nats"] > fit["gaussian_nats"] - 0.02 and fit["gaussian_nats"] > fit["standard_normal_nats"]
    own, fitted = run.scores(), run.scores(fitted_prior=True)
    np.testing.assert_array_equal(own.rec, fitted.rec)
    # What the KL gains is what the density of the latents gains.
    gain = fit["mixture_nats"] - fit["standard_normal_nats"]
    assert own.kl.mean() - fitted.kl.mean() == pytest.approx(gain, abs=0.15)


def test_latents_of_tokens_and_repeated_latents_reconstruct(long: Runs, quick: Runs) -> None:
    # Written from the latents alone, without a word before: much better than by the words' frequencies.
    words = int(long["token"].valid["tokens"]) / long["token"].valid["sequences"]
    unigram = words * math.log(20)
    assert long["token"].valid["rec_per_seq"] < 0.5 * unigram
    assert long["repeated-z"].valid["rec_per_seq"] < 0.7 * unigram
    assert long["token"].valid["mutual_information_latents"] > long["token"].valid["sequences"]


def test_the_linear_model_uses_its_latent(long: Runs) -> None:
    assert long["bag-of-words"].valid["mutual_information_nats"] > 0.5


def test_the_best_validation_is_exported_of_averaged_weights(long: Runs) -> None:
    run = long["best"]
    best = max(record["elbo_per_seq"] for record in run.kind("valid"))
    scores = run.scores(max_sequences=1000)
    assert -(scores.rec + scores.kl).mean() == pytest.approx(best, rel=1e-5)


def test_a_plateau_cuts_the_learning_rate_and_ends_the_run(long: Runs) -> None:
    run = long["plateau"]
    rates = sorted(set(run.curve("learning_rate")[1:].tolist()), reverse=True)
    assert rates == pytest.approx([2.0, 1.0, 0.5])
    assert run.records[-1]["step"] < STEPS
