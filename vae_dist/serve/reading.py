"""Endpoints that read texts: into their latents, and how likely they are."""

from __future__ import annotations

import base64
import math
import time

import torch
from fastapi import APIRouter

from vae_dist.serve.about import OF_WORK, Here
from vae_dist.serve.request_schemas import EmbeddingsRequest, EncodeRequest, ScoreRequest
from vae_dist.serve.response_schemas import (
    Embedding,
    EmbeddingsResponse,
    EncodeResponse,
    Encoding,
    Score,
    ScoreResponse,
    Usage,
)

_LARGEST_EXPONENT = 700.0
router = APIRouter(responses=OF_WORK)


@router.post("/v1/encode")
async def encode(body: EncodeRequest, models: Here) -> EncodeResponse:
    """The posterior of each text."""
    model = models.find(body.model)
    data = [
        Encoding(
            index=i, mean=one.mean.tolist(), logvar=one.logvar.tolist(), tokens=len(one.ids), truncated=one.truncated
        )
        for i, one in enumerate(await model.encode(body.input))
    ]
    return EncodeResponse(model=model.name, created=int(time.time()), data=data)


@router.post("/v1/score")
async def score(body: ScoreRequest, models: Here) -> ScoreResponse:
    """How likely each text is."""
    model, samples = models.find(body.model), body.importance_samples
    data = []
    for i, text in enumerate(await model.encode(body.input)):
        one = await model.likelihood(text, samples)
        ppl = math.exp(min(_LARGEST_EXPONENT, one["iw_nll"] / one["tokens"]))
        data.append(Score(index=i, truncated=text.truncated, ppl=ppl, **one))
    return ScoreResponse(model=model.name, created=int(time.time()), importance_samples=samples, data=data)


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, models: Here) -> EmbeddingsResponse:
    """The posterior mean of each text, as OpenAI's clients ask for embeddings."""
    model = models.find(body.model)
    model.text.require_one_latent("An embedding")
    encoded = await model.encode([body.input] if isinstance(body.input, str) else body.input)
    tokens = sum(len(text.ids) for text in encoded)
    return EmbeddingsResponse(
        data=[
            Embedding(index=i, embedding=_embedding(text.mean, body.encoding_format)) for i, text in enumerate(encoded)
        ],
        model=model.name,
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )


def _embedding(mean_D: torch.Tensor, encoding_format: str) -> list[float] | str:
    if encoding_format == "float":
        values: list[float] = mean_D.tolist()
        return values
    return base64.b64encode(mean_D.cpu().numpy().astype("<f4").tobytes()).decode("ascii")
