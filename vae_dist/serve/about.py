"""Endpoints that tell of the service: its page, its models, how it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import FileResponse, Response

from vae_dist import __version__
from vae_dist.decode.prior import prior_names
from vae_dist.model.vae import count_parameters
from vae_dist.serve import request_schemas
from vae_dist.serve.measures import CONTENT_TYPE
from vae_dist.serve.models import Models
from vae_dist.serve.response_schemas import Health, InfoResponse, MapResponse, Model, ModelsResponse

EXPLORER = Path(__file__).with_name("explorer")
# The page runs and asks nothing but what this service itself has.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
router = APIRouter()


async def _models(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


Responses = dict[int | str, dict[str, Any]]
Here = Annotated[Models, Depends(_models)]
UNKNOWN_MODEL: Responses = {404: {"description": "There is no model of that name; the message lists them."}}
# What computes may also be told by who stands before it (guard, gate, Ray's proxy).
OF_WORK: Responses = {
    **UNKNOWN_MODEL,
    429: {"description": "There is no room at present, or the key's rate is spent; see Retry-After."},
    503: {"description": "The service is stopping, or the model's thread has ended."},
    504: {"description": "It took longer than the service's limit."},
}


@router.get("/", include_in_schema=False)
async def explorer() -> FileResponse:
    """The page on which to explore the latent space."""
    return FileResponse(EXPLORER / "index.html", headers={"content-security-policy": _PAGE_POLICY})


@router.get("/healthz")
async def healthz() -> Health:
    """The replica answers."""
    return Health()


@router.get("/readyz", responses={503: {"description": "A model is not ready, or the service is stopping."}})
async def readyz(request: Request, models: Here) -> Health:
    """All models are loaded, have tried their shapes, and take requests."""
    if request.app.state.gate.draining:
        raise HTTPException(503, "The service is stopping.")
    ended = [model.name for model in models.all() if not model.thread.running]
    if ended:
        raise HTTPException(503, f"The thread of {', '.join(ended)} has ended.")
    return Health()


@router.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE: {}}}})
async def metrics(request: Request) -> Response:
    """The numbers of all replicas, for Prometheus."""
    return Response(await request.app.state.exposition(), media_type=CONTENT_TYPE)


@router.get("/v1/info", responses=UNKNOWN_MODEL)
async def info(models: Here, model: request_schemas.Name | None = None) -> InfoResponse:
    """Which model this is and what it accepts; by default the first."""
    found = models.find(model)
    vae, loaded = found.loaded.vae, found.loaded
    return InfoResponse(
        model=found.name,
        weights_sha256=loaded.weights_sha256,
        vae_dist_version=__version__,
        parameters=count_parameters(vae),
        latent_dim=vae.latent_dim,
        vocab_size=vae.vocab_size,
        max_tokens=loaded.max_tokens,
        prior=vae.prior_name,
        priors=prior_names(vae),
        provenance=loaded.info["provenance"],
        limits={
            "rows": request_schemas.MAX_ROWS,
            "steps": request_schemas.MAX_STEPS,
            "characters": request_schemas.MAX_TEXT_CHARACTERS,
        },
        reload_problem=models.problems.get(found.name),
    )


@router.get("/v1/map", response_model=MapResponse, responses=UNKNOWN_MODEL)
async def latent_map(models: Here, model: request_schemas.Name | None = None) -> Response:
    """Validation texts on the plane of largest variance of their posterior means."""
    return Response(models.find(model).map, media_type="application/json")


@router.get("/v1/models")
async def list_models(models: Here) -> ModelsResponse:
    """The models, as OpenAI's clients list them."""
    return ModelsResponse(data=[Model(id=one.name, created=one.created) for one in models.all()])
