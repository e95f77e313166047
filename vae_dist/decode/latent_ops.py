"""Text in, text out on a loaded model: samples, reconstructions, ways through the latent. CLI, report, server share it.

Each has two halves, so that a server can let many share an engine: what is asked of a decoder (`..._requests`), and
the texts of what it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from vae_dist.data.text.tokenizer import Tokenizer
from vae_dist.decode.encode import Encoded, encode
from vae_dist.decode.engine import DecodeEngine, requests_of
from vae_dist.decode.latent_moves import analogy, between, neighbors, traverse
from vae_dist.decode.prior import prior_latents
from vae_dist.decode.request import Decoding, Generated, Request
from vae_dist.errors import DataError
from vae_dist.model.vae import TextVAE

# What rounding in a client's JSON may do to a unit vector's length.
_OFF_SPHERE = 1e-3


@dataclass(frozen=True)
class TextModel:
    """A model and its tokenizer, ready for text. `max_tokens` bounds what is encoded and decoded.

    `dtype` is what the decoder computes in; None is float32, as the model is.
    """

    vae: TextVAE
    tokenizer: Tokenizer
    max_tokens: int
    dtype: torch.dtype | None = None

    @cached_property
    def engine(self) -> DecodeEngine:
        """Decodes for this model, on the caller's thread."""
        return DecodeEngine(self.vae, self.max_tokens, dtype=self.dtype)

    def sample(
        self, count: int, seed: int, decoding: Decoding, prior_scale: float = 1.0
    ) -> tuple[list[str], list[Generated], torch.Tensor]:
        """Texts from the prior; row i is drawn with seed + i, alone or in any company. Also rows and z [n, D]."""
        requests, z = self.sample_requests(count, seed, decoding, prior_scale)
        rows = self.engine.run(requests)
        return self.texts(rows), rows, z

    def reconstruct(self, texts: Sequence[str], seed: int, decoding: Decoding) -> tuple[list[str], list[Generated]]:
        """Each text decoded from its posterior mean."""
        rows = self.engine.run(self.reconstruct_requests(self.encode(texts), seed, decoding))
        return self.texts(rows), rows

    def interpolate(
        self, a: str, b: str, steps: int, path: str, seed: int, decoding: Decoding
    ) -> tuple[list[float], list[str], list[Generated]]:
        """`steps` points from a's posterior mean (t = 0) to b's (t = 1), as `interpolate_requests` has it."""
        start, end = self.encode([a, b])
        t, requests = self.interpolate_requests(start, end, steps, path, seed, decoding)
        rows = self.engine.run(requests)
        return t, self.texts(rows), rows

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text's tokens and posterior; a text longer than `max_tokens` keeps its start and its end of sequence.

        Raises:
            DataError: a text holds no token, or the model has no latent.
        """
        encoded = self.tokenizer.encode_batch(list(texts))
        truncated = [len(ids) > self.max_tokens for ids in encoded]
        kept = [
            np.append(ids[: self.max_tokens - 1], ids[-1]) if cut else ids
            for ids, cut in zip(encoded, truncated, strict=True)
        ]
        for text, ids in zip(texts, kept, strict=True):
            if len(ids) < 2 or not text.strip():
                raise DataError(f"The text {text!r} holds no token. Give at least one word.")
        return encode(self.vae, kept, truncated)

    def sample_requests(
        self, count: int, seed: int, decoding: Decoding, prior_scale: float = 1.0, prior: str | None = None
    ) -> tuple[list[Request], torch.Tensor]:
        """Requests for texts from a prior (`prior.prior_latents`), and their z."""
        seeds = range(seed, seed + count)
        z = prior_latents(self.vae, seeds, self.max_tokens, prior_scale, prior)
        return requests_of(z, seeds, decoding), z

    def reconstruct_requests(self, texts: Sequence[Encoded], seed: int, decoding: Decoding) -> list[Request]:
        """Requests for the texts of posterior means."""
        return [Request(text.mean, seed + i, decoding) for i, text in enumerate(texts)]

    def interpolate_requests(
        self, a: Encoded, b: Encoded, steps: int, path: str, seed: int, decoding: Decoding
    ) -> tuple[list[float], list[Request]]:
        """`steps` points t, and requests for the texts there, along a line or a great circle.

        Where every token has a latent each position goes its own way, and one that a text lacks has the other's
        latent. On the sphere a line is projected onto it.
        """
        starts, ends = (text.mean if self.vae.per_token else text.mean[None] for text in (a, b))
        lengths = len(starts), len(ends)
        starts, ends = torch.cat([starts, ends[lengths[0] :]]), torch.cat([ends, starts[lengths[1] :]])
        t = torch.linspace(0.0, 1.0, steps, device=starts.device)
        points = []
        for at in t:
            z = torch.stack([between(x, y, at, path, self.is_sphere) for x, y in zip(starts, ends, strict=True)])
            most = round((1.0 - float(at)) * lengths[0] + float(at) * lengths[1])
            points.append(z[:most] if self.vae.per_token else z[0])
        return t.tolist(), [Request(z, seed, decoding) for z in points]

    def neighbor_requests(
        self, centre: torch.Tensor, radius: float, count: int, seed: int, decoding: Decoding
    ) -> tuple[torch.Tensor, list[Request]]:
        """Points at a distance from a latent, [D] or [T, D] (`latent_moves.neighbors`), and their requests."""
        z = neighbors(centre, radius, count, seed, self.is_sphere)
        return z, [Request(point, seed + i, decoding) for i, point in enumerate(z)]

    def analogy_request(
        self, a: Encoded, b: Encoded, c: Encoded, strength: float, seed: int, decoding: Decoding
    ) -> tuple[torch.Tensor, Request]:
        """The point that c is to what b is to a (`latent_moves.analogy`), and its request.

        Raises:
            DataError: every token has a latent.
        """
        self.require_one_latent("An analogy")
        z_D = analogy(a.mean, b.mean, c.mean, strength, self.is_sphere)
        return z_D, Request(z_D, seed, decoding)

    def traverse_requests(
        self, text: Encoded, dimension: int, values: list[float], seed: int, decoding: Decoding
    ) -> tuple[torch.Tensor, list[Request]]:
        """A text's posterior mean with one dimension at each of the values, [n, D], and the requests.

        Raises:
            DataError: there is no such dimension, or every token has a latent.
        """
        self.require_one_latent("A walk along a dimension")
        if not 0 <= dimension < self.vae.latent_dim:
            raise DataError(f"There is no dimension {dimension}: this model's are 0 to {self.vae.latent_dim - 1}.")
        z_nD = traverse(text.mean, dimension, values, self.is_sphere)
        return z_nD, [Request(z_D, seed, decoding) for z_D in z_nD]

    def decode_requests(self, latents: Sequence[Sequence[float]], seed: int, decoding: Decoding) -> list[Request]:
        """Requests for latents that the caller brings, one a text.

        Raises:
            DataError: one has another size than the model's, is not on the sphere where they must be, or the model
                wants one for each token.
        """
        self.require_one_latent("Decoding a vector")
        requests = []
        for number, latent in enumerate(latents):
            if len(latent) != self.vae.latent_dim:
                raise DataError(
                    f"Latent {number} has {len(latent)} dimensions; this model's have {self.vae.latent_dim}."
                )
            z_D = torch.tensor(latent, dtype=torch.float32, device=self.vae.output_bias.device)
            if self.is_sphere and not abs(float(z_D.norm()) - 1.0) < _OFF_SPHERE:
                raise DataError(
                    f"Latent {number} has length {float(z_D.norm()):g}; this model's lie on the unit sphere."
                )
            requests.append(Request(z_D, seed + number, decoding))
        return requests

    @property
    def is_sphere(self) -> bool:
        """Whether latents lie on the unit sphere."""
        return self.vae.config.posterior.kind == "vmf"

    def require_one_latent(self, what: str) -> None:
        """Refuse what has no meaning for other models.

        Raises:
            DataError: the model has no latent, or one for every token.
        """
        if self.vae.encoder is None or self.vae.per_token:
            found = "no latent" if self.vae.encoder is None else "a latent for every token"
            raise DataError(f"{what} needs a model with one latent a text; this one has {found}.")

    def texts(self, rows: Sequence[Generated]) -> list[str]:
        """Decoded rows as text."""
        return [self.tokenizer.decode(row.tokens) for row in rows]
