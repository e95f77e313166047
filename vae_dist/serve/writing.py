"""Endpoints that write texts: whole, or in pieces as they are written."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from fastapi import APIRouter
from pydantic import BaseModel

from vae_dist.decode.request import Decoding, Generated
from vae_dist.decode.request import Request as Row
from vae_dist.serve.about import OF_WORK, Here, Responses
from vae_dist.serve.events import MEDIA_TYPE, answer_with, in_order, pieces
from vae_dist.serve.models import Models, ServedModel
from vae_dist.serve.request_schemas import (
    AnalogyRequest,
    DecodeRequest,
    DecodingOptions,
    InterpolateRequest,
    NeighborsRequest,
    ReconstructRequest,
    SampleRequest,
    TraverseRequest,
)
from vae_dist.serve.response_schemas import (
    AnalogyResponse,
    Choice,
    DecodeResponse,
    InterpolateResponse,
    Neighbor,
    NeighborsResponse,
    PiecesEvent,
    Point,
    PointEvent,
    Reconstruction,
    ReconstructResponse,
    SampleResponse,
    Step,
    TraverseResponse,
)

router = APIRouter(responses=OF_WORK)


def _streamed(event: type[BaseModel]) -> Responses:
    schema = {"$ref": f"#/components/schemas/{event.__name__}"}
    return {200: {"content": {MEDIA_TYPE: {"schema": schema}}}}


@dataclass(frozen=True)
class _Task:
    """What is common to requests for texts: a model, a seed, how tokens are chosen."""

    model: ServedModel
    seed: int
    decoding: Decoding

    @staticmethod
    def of(body: DecodingOptions, models: Models) -> _Task:
        model = models.find(body.model)
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        return _Task(model, seed, model.decoding(body))

    @property
    def envelope(self) -> dict[str, Any]:
        return {"model": self.model.name, "created": int(time.time()), "seed": self.seed}

    async def choices(self, requests: Sequence[Row], latents: torch.Tensor | None = None) -> list[Choice]:
        """The decoded texts, each with its latent where these are given."""
        rows = await self.model.thread.decode(requests)
        shown = [None] * len(rows) if latents is None else latents.tolist()
        return [
            Choice(index=i, text=text, finish_reason=_finish(row), log_prob=row.log_prob, latent=latent)
            for i, (text, row, latent) in enumerate(zip(self.model.text.texts(rows), rows, shown, strict=True))
        ]

    async def events(self, whole: str, requests: Sequence[Row], rest: Any) -> AsyncGenerator[BaseModel, None]:
        """The texts in pieces; `whole` names the object that they are pieces of."""
        envelope = {"object": f"{whole}.chunk", **self.envelope}
        async with aclosing(pieces(self.model, requests, rest)) as found:
            async for choices in found:
                yield PiecesEvent(**envelope, choices=choices)


def _finish(row: Generated) -> Literal["stop", "length"]:
    return "stop" if row.finished else "length"


@router.post("/v1/sample", response_model=SampleResponse, responses=_streamed(PiecesEvent))
async def sample(body: SampleRequest, models: Here) -> Any:
    """Texts drawn from the prior."""
    task = _Task.of(body, models)
    ask = task.model.text.sample_requests
    call = task.model.thread.call
    requests, z_BD = await call(ask, body.n, task.seed, task.decoding, body.prior_scale, body.prior)
    if not body.stream:
        choices = await task.choices(requests, z_BD if body.return_latent else None)
        return SampleResponse(**task.envelope, choices=choices)

    async def rest(index: int, row: Generated) -> dict[str, Any]:
        return {"latent": z_BD[index].tolist()} if body.return_latent else {}

    return await answer_with(task.events("vae.sample", requests, rest))


@router.post("/v1/decode", response_model=DecodeResponse, responses=_streamed(PiecesEvent))
async def decode(body: DecodeRequest, models: Here) -> Any:
    """Texts of latents that the caller brings."""
    task = _Task.of(body, models)
    requests = task.model.text.decode_requests(body.latent, task.seed, task.decoding)
    if not body.stream:
        return DecodeResponse(**task.envelope, choices=await task.choices(requests))

    async def rest(index: int, row: Generated) -> dict[str, Any]:
        return {}

    return await answer_with(task.events("vae.decoding", requests, rest))


@router.post("/v1/reconstruct", response_model=ReconstructResponse, responses=_streamed(PiecesEvent))
async def reconstruct(body: ReconstructRequest, models: Here) -> Any:
    """Each input decoded from its posterior mean, with its score."""
    task = _Task.of(body, models)
    encoded = await task.model.encode(body.input)
    requests = task.model.text.reconstruct_requests(encoded, task.seed, task.decoding)
    if body.stream:

        async def rest(index: int, row: Generated) -> dict[str, Any]:
            (score,) = await task.model.score([(encoded[index], row)])
            return {"input": body.input[index], **score}

        return await answer_with(task.events("vae.reconstruction", requests, rest))
    rows = await task.model.thread.decode(requests)
    scores = await task.model.score(list(zip(encoded, rows, strict=True)))
    choices = [
        Reconstruction(index=i, text=text, finish_reason=_finish(row), log_prob=row.log_prob, input=given, **score)
        for i, (text, row, given, score) in enumerate(
            zip(task.model.text.texts(rows), rows, body.input, scores, strict=True)
        )
    ]
    return ReconstructResponse(**task.envelope, choices=choices)


@router.post("/v1/interpolate", response_model=InterpolateResponse, responses=_streamed(PointEvent))
async def interpolate(body: InterpolateRequest, models: Here) -> Any:
    """Texts between two texts; the ends are their reconstructions."""
    task = _Task.of(body, models)
    a, b = await task.model.encode([body.a, body.b])
    ask = task.model.text.interpolate_requests
    t, requests = ask(a, b, body.steps, body.path, task.seed, task.decoding)

    def point(index: int, row: Generated) -> Point:
        (text,) = task.model.text.texts([row])
        return Point(t=t[index], text=text, finish_reason=_finish(row), log_prob=row.log_prob)

    async def events() -> AsyncGenerator[BaseModel, None]:
        async with aclosing(in_order(task.model, requests)) as rows:
            async for index, row in rows:
                yield PointEvent(**task.envelope, points=[point(index, row)])

    if body.stream:
        return await answer_with(events())
    points = [point(i, row) for i, row in enumerate(await task.model.thread.decode(requests))]
    return InterpolateResponse(**task.envelope, a=body.a, b=body.b, path=body.path, points=points)


@router.post("/v1/neighbors")
async def neighbors(body: NeighborsRequest, models: Here) -> NeighborsResponse:
    """Texts around a text, or around a latent that the caller brings."""
    task = _Task.of(body, models)
    model, seed, decoding = task.model, task.seed, task.decoding
    if body.latent is None:
        assert body.input is not None, "the schema wants one of the two"
        (centre,) = model.text.reconstruct_requests(await model.encode([body.input]), seed, decoding)
    else:
        (centre,) = model.text.decode_requests([body.latent], seed, decoding)
    z, requests = await model.thread.call(model.text.neighbor_requests, centre.z, body.radius, body.n, seed, decoding)
    own, *others = await task.choices([centre, *requests], torch.cat([centre.z[None], z]))
    distances = (z - centre.z).flatten(1).norm(dim=-1).tolist()
    choices = [
        Neighbor(**choice.model_dump(exclude={"index"}), index=i, distance=distance)
        for i, (choice, distance) in enumerate(zip(others, distances, strict=True))
    ]
    return NeighborsResponse(**task.envelope, input=body.input, reconstruction=own.text, choices=choices)


@router.post("/v1/analogy")
async def analogy(body: AnalogyRequest, models: Here) -> AnalogyResponse:
    """a is to b as c is to the answer."""
    task = _Task.of(body, models)
    a, b, c = await task.model.encode([body.a, body.b, body.c])
    z_D, request = task.model.text.analogy_request(a, b, c, body.strength, task.seed, task.decoding)
    means = [a.mean, b.mean, c.mean]
    own = [Row(mean_D, task.seed, task.decoding) for mean_D in means]
    answer, *reconstructions = await task.choices([request, *own], torch.stack([z_D, *means]))
    return AnalogyResponse(**task.envelope, reconstructions=[one.text for one in reconstructions], choices=[answer])


@router.post("/v1/traverse")
async def traverse(body: TraverseRequest, models: Here) -> TraverseResponse:
    """A text with one dimension of its latent moved."""
    task = _Task.of(body, models)
    (text,) = await task.model.encode([body.input])
    values = torch.linspace(-body.extent, body.extent, body.steps).tolist()
    ask = task.model.text.traverse_requests
    z_nD, requests = ask(text, body.dimension, values, task.seed, task.decoding)
    choices = [
        Step(**choice.model_dump(), value=value)
        for choice, value in zip(await task.choices(requests, z_nD), values, strict=True)
    ]
    return TraverseResponse(
        **task.envelope,
        dimension=body.dimension,
        mean=float(text.mean[body.dimension]),
        logvar=float(text.logvar[body.dimension]),
        choices=choices,
    )
