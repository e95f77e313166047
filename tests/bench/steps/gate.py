"""The plain loop's model is ours: from the same weights and the same z both have the same loss."""

from __future__ import annotations

import torch
from steps.plain import LstmVae, TransformerVae

from vae_dist.data.stream.batch import Batch
from vae_dist.model.vae import TextVAE

_TOLERANCE = 1e-5


class WrongModelError(Exception):
    """The two are not the same model."""


def give_weights(plain: LstmVae | TransformerVae, ours: TextVAE) -> None:
    """Ours into the plain model, by name; every name has its place."""
    renamed = {}
    for name, value in ours.state_dict().items():
        for old, new in (
            ("encoder.forward_lstm.", "encoder."),
            ("posterior.", "to_posterior."),
            ("decoder.lstm.", "decoder."),
            ("decoder.to_", "to_"),
        ):
            name = name.replace(old, new)
        renamed[name] = value
    plain.load_state_dict(renamed, strict=True)


@torch.no_grad()
def require_same_loss(plain: LstmVae | TransformerVae, ours: TextVAE, batch: Batch) -> None:
    """Compare -ELBO at z = mean, in fp32.

    Raises:
        WrongModelError: it differs by more than 1e-5 of its value.
    """
    mean_BD, _ = ours.encode(batch)
    rng = torch.zeros(2, dtype=torch.int64)
    output = ours(batch, rng, z=mean_BD)
    expected = float((output.rec_KB[0] + output.latent.kl).mean())
    found = float(plain(batch.tokens_BT, batch.lengths_B, torch.zeros_like(mean_BD)))
    if not abs(found - expected) <= _TOLERANCE * abs(expected):
        raise WrongModelError(f"the plain loop's -ELBO is {found:.6f} nats per sequence, ours {expected:.6f}")
