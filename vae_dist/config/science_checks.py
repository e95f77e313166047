"""Checks across `model`, `objective`, `optimizer` and `cluster`: combinations that would not train what they say.

`CLASHES` is the table of pairs; what needs arithmetic or three settings is a function below it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vae_dist.config.model_schema import GaussianConfig, HuggingFaceConfig, TransformerConfig, VmfConfig
from vae_dist.config.objective_schema import (
    CyclicalAnnealing,
    LinearAnnealing,
    LogisticAnnealing,
    PidControl,
    ZeroLinearAnnealing,
)
from vae_dist.config.schema import Config
from vae_dist.config.section import Section

Predicate = Callable[[Any], bool]
# A logistic has arrived at 99 % of beta.
_LOGISTIC_EXPONENT = math.log(0.99 / 0.01)


class Clash(NamedTuple):
    """Two keys whose values do not go together when both tests hold; `remedy` says why not, and what to set."""

    first: str
    first_test: Predicate
    second: str
    second_test: Predicate
    remedy: str


def science_problems(config: Config) -> list[str]:
    """Every combination that would not train what it says, as messages; empty when there is none."""
    if config.objective.free_bits_nats == 0.0:
        off = config.objective.model_copy(update={"free_bits": "none"})
        config = config.model_copy(update={"objective": off})
    clashes = (_clash_message(config, clash) for clash in CLASHES)
    return [*(message for message in clashes if message is not None), *(m for rule in _RULES for m in rule(config))]


def cycle_problem(config: Config, total_steps: int) -> str | None:
    """Why a run of so many steps has no room for its annealing's cycles, or None."""
    annealing = config.objective.annealing
    if not isinstance(annealing, CyclicalAnnealing | ZeroLinearAnnealing):
        return None
    steps = round((1.0 - config.objective.autoencoder_fraction) * total_steps)
    if 2 * annealing.cycles <= steps or annealing.cycles == 1:
        return None
    return (
        f"objective.annealing.cycles = {annealing.cycles} needs at least two steps a cycle, and the run anneals over "
        f"{steps}. Use at most {max(1, steps // 2)} cycles, or more steps."
    )


def _one_of(*values: Any) -> Predicate:
    return lambda value: value in values


def _other_than(*values: Any) -> Predicate:
    return lambda value: value not in values


def _above(limit: float) -> Predicate:
    return lambda value: value is not None and value > limit


def _given(value: Any) -> bool:
    return value is not None


# A key, a test of its value, and the setting that mends it.
_PRIOR = ("model.prior.kind", _other_than("standard"), "model.prior={kind: standard}")
_FITTED_PRIOR = ("model.sampling_components", _above(0), "model.sampling_components=0")
_RATE_CONTROL = ("objective.rate_control.kind", _given, "objective.rate_control=null")
_ENTROPY = ("objective.entropy_weight", _above(0), "objective.entropy_weight=0")
_FREE_BITS = ("objective.free_bits", _other_than("none"), "objective.free_bits=none")
_BATCH_NORM = ("model.posterior.batch_norm_gamma", _given, "model.posterior={kind: gaussian}")
# Beta, its annealing and free bits have defaults that a language model has no use for: they are not read.
_WITHOUT_LATENT = (
    _PRIOR,
    _FITTED_PRIOR,
    _RATE_CONTROL,
    _ENTROPY,
    _BATCH_NORM,
    ("objective.aggressive", _given, "objective.aggressive=null"),
    ("model.posterior.kind", _other_than("gaussian"), "model.posterior={kind: gaussian}"),
    ("model.teacher_forcing", _one_of(False), "model.teacher_forcing=true"),
    ("objective.autoencoder_fraction", _above(0), "objective.autoencoder_fraction=0"),
    ("objective.importance_samples", _above(1), "objective.importance_samples=1"),
)
_LATENT_PER_TOKEN = (
    ("model.injection", _other_than("embedding"), "model.injection=embedding"),
    ("model.encoder.kind", _one_of("bag_of_words"), "model.encoder={kind: lstm}"),
    ("model.prior.kind", _one_of("vamp"), "model.prior={kind: mixture}"),
    ("objective.free_bits", _one_of("batch_dimension"), "objective.free_bits=batch_sequence"),
    _FITTED_PRIOR,
)
_WHOLE_BATCH = (
    ("objective.free_bits", _one_of("batch_dimension", "batch_sequence"), "objective.free_bits=dimension"),
    ("objective.rate_control.kind", _one_of("capacity"), "objective.rate_control=null"),
    _BATCH_NORM,
)


def _clashes(
    first: str, first_test: Predicate, seconds: tuple[tuple[str, Predicate, str], ...], why: str, mend: str
) -> Iterator[Clash]:
    """One key against several: the remedy is to mend either side."""
    for second, test, fix in seconds:
        yield Clash(first, first_test, second, test, f"{why}. Use {fix}, or {mend}.")


CLASHES: tuple[Clash, ...] = (
    *_clashes(
        "model.latent", _one_of("none"), _WITHOUT_LATENT, "a language model has no latent", "model.latent=sequence"
    ),
    *_clashes(
        "model.latent", _one_of("token"), _LATENT_PER_TOKEN,
        "that is defined for one latent a sequence, not one a token", "model.latent=sequence",
    ),
    *_clashes(
        "model.posterior.kind", _one_of("vmf"), (_PRIOR, _FITTED_PRIOR, _RATE_CONTROL, _ENTROPY, _FREE_BITS),
        "a vMF posterior lies on the sphere, and its KL to the uniform distribution is a constant",
        "model.posterior={kind: gaussian}",
    ),
    *_clashes(
        "model.posterior.kind", _one_of("delta"), (_PRIOR, _RATE_CONTROL, _ENTROPY, _FREE_BITS),
        "a delta posterior holds its own rate against a standard normal prior", "model.posterior={kind: gaussian}",
    ),
    *_clashes(
        "train.micro_batch_tokens", _given, _WHOLE_BATCH,
        "it takes a mean over the whole global batch, which must go through the model at once",
        "train.micro_batch_tokens=null (and more workers)",
    ),
    *_clashes(
        "objective.importance_samples", _above(1), (_FREE_BITS, _RATE_CONTROL),
        "the importance-weighted bound has no KL of its own to hold", "objective.importance_samples=1",
    ),
    *_clashes(
        "objective.rate_control.kind", _given, (_FREE_BITS,),
        "both hold the KL up, and the rate would not be the one that is asked for", "objective.rate_control=null",
    ),
    Clash(
        "objective.rate_control.kind", _one_of("control_vae"),
        "objective.annealing", _other_than(LinearAnnealing()),
        "ControlVAE sets beta itself. Use objective.annealing={kind: linear}, its default, or another rate_control.",
    ),
    Clash(
        "model.prior.kind", _other_than("standard"),
        "objective.free_bits", _one_of("dimension", "batch_dimension"),
        "only against a standard normal prior has the KL dimensions. Use objective.free_bits=sequence, batch_sequence "
        "or none.",
    ),
    Clash(
        "model.prior.kind", _one_of("vamp"),
        "model.posterior.batch_norm_gamma", _given,
        "the pseudo-inputs would be normalised by the statistics of the data. Use model.posterior={kind: gaussian}, or "
        "model.prior={kind: mixture}.",
    ),
    Clash(
        "model.prior.kind", _one_of("flow"),
        "model.latent_dim", _one_of(1),
        "a coupling layer changes one half of z given the other. Use model.latent_dim=2 or more.",
    ),
    Clash(
        "model.posterior.kind", _one_of("vmf"),
        "model.latent_dim", _one_of(1),
        "the sphere has two points there. Use model.latent_dim=2 or more.",
    ),
    Clash(
        "model.bidirectional", _one_of(True),
        "model.encoder.kind", _other_than("lstm"),
        "it belongs to LSTM encoders, the others see both sides already. Use model.bidirectional=false.",
    ),
    Clash(
        "model.injection", _one_of("layers", "cross_attention"),
        "model.decoder.kind", _other_than("transformer"),
        "it is a slot of a Transformer's attention. Use model.injection=both, or model.decoder={kind: transformer}.",
    ),
    *_clashes(
        "model.teacher_forcing", _one_of(False),
        (
            ("model.decoder.kind", _other_than("lstm"), "model.decoder={kind: lstm}"),
            ("model.injection", _other_than("embedding", "both"), "model.injection=embedding"),
            ("model.word_dropout", _above(0), "model.word_dropout=0"),
        ),
        "z alone is the input of an LSTM decoder at every step", "model.teacher_forcing=true",
    ),
    Clash(
        "model.decoder.kind", _one_of("bag_of_words"),
        "model.word_dropout", _above(0),
        "that decoder reads no words. Use model.word_dropout=0.",
    ),
    Clash(
        "objective.reset_decoder", _one_of(True),
        "objective.autoencoder_fraction", _one_of(0.0),
        "there is no phase after which to reset. Use objective.reset_decoder=false, or a fraction such as 0.25.",
    ),
    Clash(
        "objective.aggressive", _given,
        "objective.autoencoder_fraction", _above(0),
        "both are ways to begin. Use objective.autoencoder_fraction=0, or objective.aggressive=null.",
    ),
    Clash(
        "objective.aggressive", _given,
        "cluster.zero_stage", _above(0),
        "encoder and decoder take turns, and a sharded optimizer moves all weights. Use cluster.zero_stage=0.",
    ),
    *_clashes(
        "cluster.zero_stage", _one_of(0),
        (
            ("cluster.overlap_communication", _one_of(True), "cluster.overlap_communication=false"),
            ("cluster.offload_optimizer", _one_of(True), "cluster.offload_optimizer=false"),
        ),
        "there gradients are reduced at the end and every rank updates all weights", "cluster.zero_stage=1",
    ),
    *_clashes(
        "cluster.zero_stage", _other_than(3),
        (
            ("cluster.offload_parameters", _one_of(True), "cluster.offload_parameters=false"),
            ("cluster.hpz_ranks", _above(1), "cluster.hpz_ranks=1"),
            ("cluster.quantized_weights", _one_of(True), "cluster.quantized_weights=false"),
            ("cluster.quantized_gradients", _one_of(True), "cluster.quantized_gradients=false"),
        ),
        "it is about sharded weights", "cluster.zero_stage=3",
    ),
    *_clashes(
        "cluster.zero_stage", _one_of(3),
        (
            ("model.encoder.recurrent_dropout", _above(0), "model.encoder.recurrent_dropout=0"),
            ("model.decoder.recurrent_dropout", _above(0), "model.decoder.recurrent_dropout=0"),
            ("optimizer.average_decay", _above(0), "optimizer.average_decay=0"),
        ),
        "it needs whole weights between the passes", "cluster.zero_stage=2",
    ),
)  # fmt: skip


def _clash_message(config: Config, clash: Clash) -> str | None:
    first, second = value_at(config, clash.first), value_at(config, clash.second)
    if not (clash.first_test(first) and clash.second_test(second)):
        return None
    return f"{clash.first} = {_show(first)} does not go with {clash.second} = {_show(second)}: {clash.remedy}"


def with_values(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with other values at dotted keys, `section.field`; not validated again."""
    for key, value in changes.items():
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


def value_at(config: Config, key: str) -> Any:
    """The value of a key; None where the part it belongs to is absent or of another kind."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _show(value: Any) -> str:
    if isinstance(value, Section):
        return getattr(value, "kind", "on")
    return value if isinstance(value, str) else json.dumps(value)


def _rotary_head_sizes(config: Config) -> Iterator[str]:
    for name, part in (("encoder", config.model.encoder), ("decoder", config.model.decoder)):
        if isinstance(part, TransformerConfig) and part.hidden_dim % (2 * part.num_heads):
            yield (
                f"model.{name}.hidden_dim = {part.hidden_dim} must be a multiple of 2 x num_heads = "
                f"{2 * part.num_heads} (rotary positions pair the dimensions of a head)."
            )


def _huggingface_parts(config: Config) -> Iterator[str]:
    model = config.model
    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        if not isinstance(part, HuggingFaceConfig):
            continue
        if part.checkpoint is None and part.architecture is None:
            yield (
                f"model.{name}.kind = huggingface has neither a checkpoint nor an architecture. Give "
                f"model.{name}.checkpoint=DIRECTORY, or model.{name}.architecture={{model_type: llama, ...}}."
            )
        if part.checkpoint is not None and model.embedding_vectors is not None:
            yield (
                f"model.embedding_vectors = {model.embedding_vectors} and model.{name}.checkpoint = {part.checkpoint} "
                "are two answers to what the embeddings start from. Use model.embedding_vectors=null, or another kind "
                f"of {name}."
            )


def _annealing_arrives(config: Config) -> Iterator[str]:
    """Optimus' own settings zero 0.7 and ramp 0.5 end at 0.6 of beta in silence; these end in a message."""
    annealing = config.objective.annealing
    if isinstance(annealing, ZeroLinearAnnealing):
        # Tolerant of 0.7 + 0.3 in binary.
        if annealing.zero + annealing.ramp > 1.0 + 1e-9:
            yield (
                f"objective.annealing.zero = {annealing.zero:g} and ramp = {annealing.ramp:g} take more than a cycle, "
                f"so that beta is never reached. Use a ramp of at most {1.0 - annealing.zero:g}, or a smaller zero."
            )
        elif annealing.zero == 1.0:
            yield "objective.annealing.zero = 1 leaves no step at which beta is above 0. Use a zero below 1."
    if isinstance(annealing, LogisticAnnealing):
        exponent = annealing.steepness * (1.0 - annealing.midpoint)
        if exponent < _LOGISTIC_EXPONENT:
            yield (
                f"objective.annealing.steepness = {annealing.steepness:g} and midpoint = {annealing.midpoint:g} end "
                f"the run at {1.0 / (1.0 + math.exp(-exponent)):.0%} of beta. Make steepness x (1 - midpoint) at least "
                f"{_LOGISTIC_EXPONENT:.1f}, as with steepness=30 and midpoint=0.25."
            )


def _rate_can_be_held(config: Config) -> Iterator[str]:
    control, posterior = config.objective.rate_control, config.model.posterior
    if isinstance(control, PidControl) and control.beta_min >= config.objective.beta:
        yield (
            f"objective.rate_control.beta_min = {control.beta_min:g} leaves the controller no room below "
            f"objective.beta = {config.objective.beta:g}. Use a smaller beta_min, or a larger beta."
        )
    if control is not None and isinstance(posterior, GaussianConfig) and posterior.batch_norm_gamma is not None:
        floor = config.model.latent_dim * posterior.batch_norm_gamma**2 / 2.0
        if floor > control.nats:
            yield (
                f"objective.rate_control.nats = {control.nats:g} is below {floor:g}, the least KL that "
                f"model.posterior.batch_norm_gamma = {posterior.batch_norm_gamma:g} allows (latent_dim gamma^2 / 2). "
                "Use a smaller gamma, or more nats."
            )


def _doubly_reparameterised(config: Config) -> Iterator[str]:
    objective, model = config.objective, config.model
    if objective.importance_samples == 1 or objective.estimator != "dreg":
        return
    for key, clashes in (
        ("model.posterior.kind = vmf", isinstance(model.posterior, VmfConfig)),
        ("model.latent = token", model.latent == "token"),
    ):
        if clashes:
            yield (
                f"objective.estimator = dreg with objective.importance_samples = {objective.importance_samples} does "
                f"not go with {key}: it is written for one Gaussian latent a sequence. Use objective.estimator=iwae."
            )


_RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    _rotary_head_sizes,
    _huggingface_parts,
    _annealing_arrives,
    _rate_can_be_held,
    _doubly_reparameterised,
)
