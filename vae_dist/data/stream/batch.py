"""Batches: a rank's share of sequences, cut into micro-batches by a token budget and padded to tensors.

Shapes: B sequences, T padded length. A padding sequence has weight 0 and sample id -1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from vae_dist.data.store.sequences import Sequences, SequenceView
from vae_dist.data.text.special_ids import EOS_ID, PAD_ID


@dataclass(frozen=True)
class Share:
    """What one rank reads of one global batch.

    Attributes:
        sequences: the real sequences, at most B / world; a view into a window of the stream.
        sample_id: int64[n], 64-bit position of each sequence in the run's global order.
        real_sequences: B_real, real sequences of the batch over all ranks.
    """

    sequences: SequenceView
    sample_id: np.ndarray
    real_sequences: int


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch.

    Attributes:
        tokens_BT: int64, the tokens to predict (end of sequence last), padded with `PAD_ID`.
        lengths_B: int64, real tokens of each sequence, at least 1.
        weight_B: float32, 1 for a real sequence, 0 for padding.
        sample_id_B: int64, names the sequence's noise; -1 for padding.
        valid_N: int64, positions of the N real tokens in the flattened tokens_BT, in order. Made here, where
            lengths are host numbers, so that the model never asks a GPU for them.
        offsets_B1: int64[B + 1], where each sequence begins in valid_N.
    """

    tokens_BT: torch.Tensor
    lengths_B: torch.Tensor
    weight_B: torch.Tensor
    sample_id_B: torch.Tensor
    valid_N: torch.Tensor
    offsets_B1: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        if device.type == "cpu":
            return self
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    @property
    def sequence_N(self) -> torch.Tensor:  # noqa: N802 - a tensor of shape [N]
        """int64, which sequence each real token belongs to."""
        return torch.div(self.valid_N, self.tokens_BT.shape[1], rounding_mode="floor")

    def repeated(self, times: int) -> Batch:
        """The batch `times` over: row k B + b is sequence b."""
        again = torch.arange(times, device=self.valid_N.device)[:, None]
        starts = again * len(self.valid_N) + self.offsets_B1[:-1]
        return Batch(
            tokens_BT=self.tokens_BT.repeat(times, 1),
            lengths_B=self.lengths_B.repeat(times),
            weight_B=self.weight_B.repeat(times),
            sample_id_B=self.sample_id_B.repeat(times),
            valid_N=(again * self.tokens_BT.numel() + self.valid_N).flatten(),
            offsets_B1=torch.cat([starts.flatten(), self.offsets_B1[-1:] * times]),
        )


def collate(sequences: Sequences | SequenceView, sample_id: np.ndarray) -> Batch:
    """Pad sequences to the longest of them; no sequence at all gives one padding sequence."""
    if len(sequences) == 0:
        padding = Sequences(np.array([EOS_ID]), np.array([0, 1]))
        return _pad(padding, np.array([-1]), weight=0.0)
    return _pad(sequences, sample_id, weight=1.0)


def _pad(sequences: Sequences | SequenceView, sample_id: np.ndarray, weight: float) -> Batch:
    lengths = np.ascontiguousarray(sequences.lengths)
    shortest, longest = int(lengths.min()), int(lengths.max())
    column = np.arange(longest)
    # Lengths are alike: it is cheaper to read beyond the end of a sequence than to leave that out.
    tokens = sequences.tokens.take(sequences.starts[:, None] + column, mode="clip")
    if shortest == longest:
        valid = np.arange(tokens.size)
    else:
        is_real = column < lengths[:, None]
        tokens[~is_real] = PAD_ID
        valid = np.flatnonzero(is_real)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Batch(
        tokens_BT=torch.from_numpy(tokens.astype(np.int64)),
        lengths_B=torch.from_numpy(lengths),
        weight_B=torch.full((len(lengths),), weight),
        sample_id_B=torch.from_numpy(np.ascontiguousarray(sample_id, dtype=np.int64)),
        valid_N=torch.from_numpy(valid),
        offsets_B1=torch.from_numpy(offsets),
    )


def micro_batches(share: Share, token_budget: int | None) -> list[Batch]:
    """Cut a share into padded micro-batches of at most `token_budget` padded tokens each.

    Sequences are taken longest first, so the cut depends on the share alone; a sequence longer than the
    budget forms a micro-batch of its own. The list is never empty.
    """
    if token_budget is None or len(share.sequences) == 0:
        return [collate(share.sequences, share.sample_id)]
    lengths = share.sequences.lengths
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        count = max(1, token_budget // int(lengths[order[start]]))
        chosen = order[start : start + count]
        batches.append(collate(share.sequences.take(chosen), share.sample_id[chosen]))
        start += count
    return batches
