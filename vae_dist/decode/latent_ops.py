"""Text in, text out: sampling, reconstruction and interpolation on a loaded model. CLI, report and server share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import Batch, collate
from vae_dist.data.text.tokenizer import Tokenizer
from vae_dist.decode.generate import Decoding, Generated, generate, prior_latents
from vae_dist.errors import DataError
from vae_dist.model.vae import TextVAE


@dataclass(frozen=True)
class TextModel:
    """A model and its tokenizer, ready for text. `max_tokens` bounds what is encoded and decoded."""

    vae: TextVAE
    tokenizer: Tokenizer
    max_tokens: int

    def sample(
        self, count: int, seed: int, decoding: Decoding, prior_scale: float = 1.0
    ) -> tuple[list[str], list[Generated], torch.Tensor]:
        """Texts from the prior; row i is drawn with seed + i, alone or in any company. Also rows and z [n, D]."""
        seeds = range(seed, seed + count)
        z = prior_latents(self.vae, seeds, self.max_tokens, prior_scale)
        rows = generate(self.vae, z, seeds, decoding)
        return self.texts(rows), rows, z

    def encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """Posterior mean and log-variance [n, D] (or [n, T, D]), and which texts were truncated to `max_tokens`."""
        _, truncated, mean, logvar = self._encoded(texts)
        return mean, logvar, truncated

    def reconstruct(self, texts: Sequence[str], seed: int, decoding: Decoding) -> tuple[list[str], list[Generated]]:
        """Each text decoded from its posterior mean."""
        batch, _, mean, _ = self._encoded(texts)
        rows = generate(self.vae, mean, range(seed, seed + len(texts)), decoding, self._lengths(batch))
        return self.texts(rows), rows

    def interpolate(
        self, a: str, b: str, steps: int, path: str, seed: int, decoding: Decoding
    ) -> tuple[list[float], list[str], list[Generated]]:
        """`steps` points from a's posterior mean (t = 0) to b's (t = 1), along a line or a great circle.

        Where every token has a latent each position goes its own way, and one that a text lacks has the other's
        latent. On the sphere a line is projected onto it.
        """
        batch, _, mean, _ = self._encoded([a, b])
        lengths = self._lengths(batch)
        starts, ends = (part if self.vae.per_token else part[None] for part in mean)
        if lengths:
            position = torch.arange(len(starts), device=mean.device)[:, None]
            starts, ends = (
                torch.where(position < lengths[0], starts, ends),
                torch.where(position < lengths[1], ends, starts),
            )
        t = torch.linspace(0.0, 1.0, steps, device=mean.device)
        between = slerp if path == "slerp" else torch.lerp
        points = [torch.stack([between(x, y, at) for x, y in zip(starts, ends, strict=True)]) for at in t]
        z = torch.stack(points) if self.vae.per_token else torch.cat(points)
        if self.vae.config.posterior.kind == "vmf":
            z = torch.nn.functional.normalize(z, dim=-1)
        most = [round((1.0 - at) * lengths[0] + at * lengths[1]) for at in t.tolist()] if lengths else None
        rows = generate(self.vae, z, [seed] * steps, decoding, most)
        return t.tolist(), self.texts(rows), rows

    def batch(self, texts: Sequence[str]) -> tuple[Batch, list[bool]]:
        """Texts as a padded batch; a text longer than `max_tokens` keeps its start and its end of sequence."""
        encoded = self.tokenizer.encode_batch(list(texts))
        truncated = [len(ids) > self.max_tokens for ids in encoded]
        kept = [
            np.append(ids[: self.max_tokens - 1], ids[-1]) if cut else ids
            for ids, cut in zip(encoded, truncated, strict=True)
        ]
        for text, ids in zip(texts, kept, strict=True):
            if len(ids) < 2 or not text.strip():
                raise DataError(f"The text {text!r} holds no token. Give at least one word.")
        return collate(Sequences.from_list(kept), np.arange(len(kept))).to(self._device), truncated

    def texts(self, rows: Sequence[Generated]) -> list[str]:
        """Decoded rows as text."""
        return [self.tokenizer.decode(row.tokens) for row in rows]

    def _encoded(self, texts: Sequence[str]) -> tuple[Batch, list[bool], torch.Tensor, torch.Tensor]:
        """The texts as a batch, which were truncated, and their posterior."""
        if self.vae.encoder is None:
            raise DataError(
                "This model is a plain language model (model.latent = none): it samples, but has no latent to encode "
                "texts into. Train with model.latent=sequence."
            )
        batch, truncated = self.batch(texts)
        with torch.inference_mode():
            return batch, truncated, *self.vae.encode(batch)

    def _lengths(self, batch: Batch) -> list[int] | None:
        """Tokens of each text, which bound what is written where every token has a latent; None elsewhere."""
        return batch.lengths_B.tolist() if self.vae.per_token else None

    @property
    def _device(self) -> torch.device:
        return self.vae.output_bias.device


def slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of direction with linear interpolation of length.

    A line where there is no one great circle: for parallel vectors and from or to the origin.
    """
    length_a, length_b = a.norm(), b.norm()
    cosine = (a @ b / (length_a * length_b).clamp(min=1e-12)).clamp(-1.0, 1.0)
    angle = torch.acos(cosine)
    if float(angle.sin()) < 1e-4 or float(torch.minimum(length_a, length_b)) == 0.0:
        return torch.lerp(a, b, t)
    direction = (torch.sin((1 - t) * angle) * a / length_a + torch.sin(t * angle) * b / length_b) / angle.sin()
    return direction * torch.lerp(length_a, length_b, t)


@torch.inference_mode()
def score_texts(model: TextModel, texts: Sequence[str], rows: Sequence[Generated]) -> list[dict[str, Any]]:
    """How well each text is understood: from its posterior mean, and against its reconstruction `rows`.

    Returns:
        per text: truncated; token_accuracy, share of positions where the reconstruction has the text's token;
        nll_per_token, -log p(x | z = posterior mean) in nats; kl_per_seq in nats.
    """
    batch, truncated = model.batch(texts)
    mean, _ = model.vae.encode(batch)
    # A KL without a closed form is one draw: the same for a text in any company.
    batch = replace(batch, sample_id_B=torch.zeros_like(batch.sample_id_B))
    rng = torch.zeros(2, dtype=torch.int64, device=mean.device)
    output = model.vae(batch, rng, z=mean)
    scores = []
    for number, row in enumerate(rows):
        length = int(batch.lengths_B[number])
        given = batch.tokens_BT[number, :length].tolist()
        same = sum(a == b for a, b in zip(given, row.tokens, strict=False))
        scores.append(
            {
                "truncated": truncated[number],
                "token_accuracy": same / max(length, len(row.tokens)),
                "nll_per_token": float(output.rec_KB[0, number]) / length,
                "kl_per_seq": float(output.latent.kl[number]),
            }
        )
    return scores
