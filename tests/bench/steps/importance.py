"""-log p(x) by importance weights (Burda et al. 2016), mean over sequences: ours, and a loop over the samples.

Shapes: B sequences, T positions, D latent, K samples.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from steps.plain import PAD, LstmVae, TransformerVae
from torch.nn.utils.rnn import pad_sequence

from vae_dist.data.store.split import Split
from vae_dist.data.stream.order import mix, permute
from vae_dist.evaluate.likelihood import score_split, summarise
from vae_dist.model.vae import TextVAE

_SEED, _BATCH_SEQUENCES = 0, 32


def our_likelihood(vae: TextVAE, split: Split, sequences: int, samples: int, dtype: torch.dtype | None) -> float:
    """As `vae-dist eval` scores it; nats per sequence."""
    scores = score_split(
        vae,
        split,
        seed=_SEED,
        batch_sequences=_BATCH_SEQUENCES,
        importance_samples=samples,
        max_sequences=sequences,
        autocast=dtype,
    )
    assert scores is not None
    return float(summarise(scores)["iw_nll_per_seq"])


@torch.no_grad()
def plain_likelihood(
    plain: LstmVae | TransformerVae, split: Split, sequences: int, samples: int, dtype: torch.dtype | None
) -> float:
    """The same sequences, padded as they come, one sample of all after the other; nats per sequence."""
    numbers = permute(np.arange(sequences), split.sequences, mix(_SEED, 6))
    texts = [torch.from_numpy(split.read(int(n), 1)[0].astype(np.int64)) for n in numbers]
    total = 0.0
    for first in range(0, sequences, _BATCH_SEQUENCES):
        chosen = texts[first : first + _BATCH_SEQUENCES]
        tokens_BT = pad_sequence(chosen, batch_first=True, padding_value=PAD)
        lengths_B = torch.tensor([len(text) for text in chosen])
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            mean_BD, logvar_BD = (p.float() for p in plain.encode(tokens_BT, lengths_B))
            log_weights = []
            for _ in range(samples):
                noise_BD = torch.randn_like(mean_BD)
                z_BD = mean_BD + noise_BD * torch.exp(0.5 * logvar_BD)
                logits = plain.decode(tokens_BT, z_BD)
                nll_BT = F.cross_entropy(logits.transpose(1, 2), tokens_BT, ignore_index=PAD, reduction="none")
                # log p(z) - log q(z | x): the constants of both densities cancel.
                log_ratio_B = -0.5 * (z_BD.square() - noise_BD.square() - logvar_BD).sum(-1)
                log_weights.append(log_ratio_B - nll_BT.sum(-1))
        total -= float((torch.logsumexp(torch.stack(log_weights), dim=0) - math.log(samples)).sum())
    return total / sequences
