"""Posterior collapse, said while it can still be mended."""

from __future__ import annotations

from typing import Any

from vae_dist.config.objective_schema import ObjectiveConfig

# Below this the latent tells less than a coin toss about a sequence.
_COLLAPSED_NATS = 0.5
# While the KL is weighted less than this its rate is bought cheaply and says little.
_MEANINGFUL_WEIGHT = 0.5


def collapse_warning(validation: dict[str, Any], kl_weight: float, objective: ObjectiveConfig) -> str | None:
    """A warning with its remedy where validation shows a latent that is not used, or None.

    Args:
        validation: of `evaluate.likelihood.summarise`.
        kl_weight: what the KL is multiplied with now.
        objective: what is done against collapse already.
    """
    kl, information = validation["kl_per_seq"], validation["mutual_information_nats"]
    if kl_weight < _MEANINGFUL_WEIGHT or (kl >= _COLLAPSED_NATS and information >= _COLLAPSED_NATS):
        return None
    if objective.free_bits == "none" or objective.free_bits_nats == 0.0:
        remedy = "set objective.free_bits=dimension objective.free_bits_nats=0.25"
    elif objective.autoencoder_fraction == 0.0:
        remedy = "set objective.autoencoder_fraction=0.2 objective.reset_decoder=true"
    else:
        remedy = "raise objective.free_bits_nats, or weaken the decoder with model.word_dropout=0.2"
    return (
        f"warning: the posterior has collapsed: KL {kl:.2f} nats per sequence, mutual information {information:.2f}, "
        f"{validation['active_units']} active units. The decoder ignores z; {remedy}, under another run.name."
    )
