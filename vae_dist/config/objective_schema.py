"""The `objective` and `optimizer` sections: what is minimised, what keeps the latent in use, and how weights move."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from vae_dist.config.section import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Share,
    by_kind,
)


class LinearAnnealing(Section):
    """beta goes linearly from `start` to `beta` (Bowman et al. 2016)."""

    kind: Literal["linear"] = "linear"
    start: NonNegativeFloat = 0.0
    """Weight of the KL at step 0."""
    fraction: Fraction = 0.4
    """Share of the phase's steps that this takes; 0: beta from the start."""


class LogisticAnnealing(Section):
    """beta / (1 + exp(-steepness (t - midpoint))), t the share of the phase's steps (Bowman et al. 2016)."""

    kind: Literal["logistic"] = "logistic"
    midpoint: Fraction = 0.25
    """Share of the phase's steps at which half of beta is reached."""
    steepness: PositiveFloat = 30.0
    """Slope; at 30, 5 to 95 % takes a fifth of the run."""


class CyclicalAnnealing(Section):
    """Linear from 0 to beta, then constant, again and again (Fu et al. 2019)."""

    kind: Literal["cyclical"] = "cyclical"
    cycles: Positive = 4
    """M, repetitions in the run."""
    ramp: Fraction = 0.5
    """R, share of a cycle in which beta rises."""


class ZeroLinearAnnealing(Section):
    """Zero, then linear, then beta, in each cycle (Optimus, Li et al. 2020)."""

    kind: Literal["zero_linear"] = "zero_linear"
    cycles: Positive = 1
    """Repetitions in the run."""
    zero: Fraction = 0.5
    """Share of a cycle at 0."""
    ramp: Fraction = 0.25
    """Share of a cycle in which beta rises; zero + ramp must not exceed 1."""


Annealing = Annotated[
    Annotated[LinearAnnealing, Tag("linear")]
    | Annotated[LogisticAnnealing, Tag("logistic")]
    | Annotated[CyclicalAnnealing, Tag("cyclical")]
    | Annotated[ZeroLinearAnnealing, Tag("zero_linear")],
    by_kind("linear", "logistic", "cyclical", "zero_linear"),
]


class CapacityControl(Section):
    """beta |KL - C|, KL the mean over the global batch, C from 0 to `nats` (Burgess et al. 2018)."""

    kind: Literal["capacity"] = "capacity"
    nats: NonNegativeFloat
    """C at the end of its ramp, per sequence."""
    ramp: Fraction = 0.25
    """Share of the phase's steps in which C rises."""


class PidControl(Section):
    """beta set by a PI controller that holds the KL at a set point (ControlVAE, Shao et al. 2020)."""

    kind: Literal["control_vae"] = "control_vae"
    nats: PositiveFloat
    """The set point, per sequence."""
    kp: PositiveFloat = 0.01
    """Proportional gain."""
    ki: PositiveFloat = 0.0001
    """Integral gain, a step and nat."""
    beta_min: NonNegativeFloat = 0.0
    """beta stays between this and `objective.beta`."""


class MdrControl(Section):
    """The KL is at least `nats`, by a Lagrange multiplier (minimum desired rate, Pelsmaeker and Aziz 2020)."""

    kind: Literal["mdr"] = "mdr"
    nats: PositiveFloat
    """The least rate, per sequence."""
    learning_rate: PositiveFloat = 0.01
    """Of the multiplier, which RMSprop raises while the KL is too small and lowers otherwise, not below 0."""


RateControl = Annotated[
    Annotated[CapacityControl, Tag("capacity")]
    | Annotated[PidControl, Tag("control_vae")]
    | Annotated[MdrControl, Tag("mdr")],
    by_kind("capacity", "control_vae", "mdr"),
]


class AggressiveConfig(Section):
    """Many encoder updates for one of the decoder while the latent's information grows (He et al. 2019)."""

    max_encoder_steps: Positive = 100
    """Most encoder-only steps between two decoder steps."""
    check_steps: Positive = 15
    """Encoder steps stop when their mean loss per token over so many steps rose."""
    max_fraction: Fraction = 0.5
    """It ends when the mutual information on validation falls, at the latest after this share of the run's steps."""


class ObjectiveConfig(Section):
    """-ELBO per sequence, in nats: rec + beta * KL."""

    beta: NonNegativeFloat = 1.0
    """Weight of the KL after the annealing."""
    annealing: Annealing = LinearAnnealing()
    """How the KL gets its weight, by its `kind`."""
    free_bits: Literal["none", "dimension", "sequence", "batch_dimension", "batch_sequence"] = "dimension"
    """The KL counts at least `free_bits_nats`: in each dimension of each latent (Li et al. 2019), in each sequence,
    in each dimension on average over the global batch (Kingma et al. 2016), or in all on average over it."""
    free_bits_nats: NonNegativeFloat = 0.15
    """Per dimension in the dimension forms, per sequence in the others; 0 is off."""
    rate_control: RateControl | None = None
    """What holds the KL at a rate in place of, or on top of, a fixed beta."""
    autoencoder_fraction: Share = 0.0
    """Share of the run's steps that first train an autoencoder: KL weight 0, no free bits (Li et al. 2019). Annealing
    and learning rate begin anew after it."""
    reset_decoder: bool = False
    """After the autoencoder phase all but embeddings, encoder and posterior start again from fresh weights."""
    aggressive: AggressiveConfig | None = None
    importance_samples: Positive = 1
    """K; above 1 the importance-weighted bound is trained (Burda et al. 2016)."""
    estimator: Literal["iwae", "dreg"] = "dreg"
    """Gradient of the importance-weighted bound: its own, or the doubly reparameterised one, whose noise in the
    encoder's gradient does not grow with K (Tucker et al. 2019)."""
    entropy_weight: NonNegativeFloat = 0.0
    """Subtract this times the posterior's entropy from the loss, in an autoencoder phase too."""


class PlateauConfig(Section):
    """Cut the learning rate and go back to the best weights where validation stops improving (He et al. 2019)."""

    patience: Positive = 2
    """Validations without improvement."""
    first_validation: NonNegative = 15
    """Validations before this one never count as a plateau."""
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """What the learning rate is multiplied with."""
    max_reductions: Positive = 5
    """The run ends at the plateau after so many."""


class OptimizerConfig(Section):
    """AdamW or SGD, with warm-up and decay."""

    kind: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 0.006
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "plateau"] = "cosine"
    """After the warm-up: half a cosine, constant, or cut where validation stops improving."""
    plateau: PlateauConfig = PlateauConfig()
    """Of the schedule `plateau`."""
    min_learning_rate_ratio: Fraction = 0.05
    """The cosine ends at this share of the peak."""
    warmup_steps: NonNegative = 200
    """Steps of linear warm-up."""
    beta1: Share = 0.9
    """AdamW's decay of the first moment."""
    beta2: Share = 0.99
    """AdamW's decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay on matrices (not on biases, norms and embeddings)."""
    gradient_clip_norm: NonNegativeFloat = 5.0
    """Global norm at which the gradient of the per-sequence loss is clipped; 0 is off."""
    skip_above_median: Annotated[float, Field(gt=1.0)] | None = None
    """Leave out an update whose gradient norm is above so many times the median of the last 128; null: only one that
    is not finite."""
    skip_budget: NonNegative = 10
    """More updates left out between two checkpoints end the run."""
    average_decay: Share = 0.0
    """Validate and export an exponential moving average of the weights with this decay a step; 0 is off."""
