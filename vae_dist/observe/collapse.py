"""Posterior collapse, said while it can still be mended."""

from __future__ import annotations

from typing import Any

from vae_dist.config.schema import Config
from vae_dist.config.science_checks import science_problems, value_at, with_values

# Below this the latent tells less than a coin toss about a sequence.
_COLLAPSED_NATS = 0.5
# While the KL has less than this share of its weight its rate is bought cheaply and says little.
_MEANINGFUL_SHARE = 0.5
# In the order in which they are worth trying, with the values to set.
_REMEDIES: tuple[dict[str, Any], ...] = (
    {"objective.free_bits": "dimension", "objective.free_bits_nats": 0.25},
    {"objective.free_bits": "sequence", "objective.free_bits_nats": 6.0},
    {"objective.autoencoder_fraction": 0.2, "objective.reset_decoder": True},
    {"model.word_dropout": 0.2},
)


def collapse_warning(validation: dict[str, Any], kl_weight: float, config: Config) -> str | None:
    """A warning with its remedy where validation shows a latent that is not used, or None.

    Args:
        validation: of `evaluate.likelihood.summarise`.
        kl_weight: what the KL is multiplied with now.
        config: what is done against collapse already; the remedy goes with it.
    """
    kl, information = validation["kl_per_seq"], validation["mutual_information_nats"]
    if min(kl, information) >= _COLLAPSED_NATS or kl_weight < _MEANINGFUL_SHARE * config.objective.beta:
        return None
    return (
        f"warning: the posterior has collapsed: KL {kl:.2f} nats per sequence, mutual information {information:.2f}, "
        f"{validation['active_units']} active units. The decoder ignores z; {_remedy(config)}, under another run.name."
    )


def _remedy(config: Config) -> str:
    has_floor = config.objective.free_bits != "none" and config.objective.free_bits_nats > 0.0
    for remedy in _REMEDIES:
        is_there = has_floor if "objective.free_bits" in remedy else all(value_at(config, key) for key in remedy)
        if not is_there and not science_problems(with_values(config, remedy)):
            return "set " + " ".join(f"{key}={str(value).lower()}" for key, value in remedy.items())
    if has_floor:
        return f"raise objective.free_bits_nats above {config.objective.free_bits_nats:g}"
    return f"lower objective.beta below {config.objective.beta:g}"
