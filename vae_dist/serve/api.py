"""The HTTP interface: FastAPI in front of the models. `python -m vae_dist.serve.reference` describes it."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles

from vae_dist import __version__
from vae_dist.errors import DataError, OverloadedError, RunError
from vae_dist.serve import about, reading, writing
from vae_dist.serve.response_schemas import ErrorEvent, PiecesEvent, PointEvent

# A body of a megabyte can be wrong in a hundred thousand places.
_PROBLEMS, _SHOWN = 10, 300


def build_api() -> FastAPI:
    """All endpoints. Before the first request `state` wants `models`, `gate` and `exposition`."""
    # Without the pages of documentation, whose scripts would come from elsewhere, and without redirects, which would
    # lead wherever a request's Host header says.
    api = FastAPI(
        title="vae_dist",
        version=__version__,
        description="Sample from a text VAE.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    api.mount("/explorer", StaticFiles(directory=about.EXPLORER))
    for router in (about.router, writing.router, reading.router):
        api.include_router(router)
    _describe_events(api)
    api.exception_handler(DataError)(_refuse)
    api.exception_handler(OverloadedError)(_postpone)
    api.exception_handler(RunError)(_stop)
    api.exception_handler(RequestValidationError)(_explain)
    return api


def _describe_events(api: FastAPI) -> None:
    """FastAPI knows the one schema of an answer, and these are the second of some."""
    schemas = api.openapi()["components"]["schemas"]
    for event in (PiecesEvent, PointEvent, ErrorEvent):
        schema = event.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update({**schema.pop("$defs", {}), event.__name__: schema})


async def _refuse(request: Request, error: DataError) -> JSONResponse:
    """Text the model cannot take is the client's to mend."""
    return JSONResponse({"detail": error.message}, status_code=422)


async def _postpone(request: Request, error: OverloadedError) -> JSONResponse:
    """There is no room at present."""
    return JSONResponse({"detail": error.message}, status_code=429, headers={"Retry-After": "1"})


async def _stop(request: Request, error: RunError) -> JSONResponse:
    """The model's thread has ended."""
    return JSONResponse({"detail": error.message}, status_code=503, headers={"Retry-After": "5"})


async def _explain(request: Request, error: RequestValidationError) -> JSONResponse:
    """What is wrong first and where, without echoing the input: it may be huge, NaN, or no valid Unicode."""
    found = [
        {"loc": [ascii(part)[:_SHOWN] for part in e["loc"]], "msg": ascii(e["msg"])[:_SHOWN], "type": e["type"]}
        for e in error.errors()[:_PROBLEMS]
    ]
    return JSONResponse({"detail": found}, status_code=422)
