"""The Ray Serve application: FastAPI in front of the pure-torch decoder."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any, Literal

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve

from vae_dist import __version__
from vae_dist.decode.generate import Decoding, Generated
from vae_dist.decode.latent_ops import TextModel, score_texts
from vae_dist.errors import DataError
from vae_dist.export.model_dir import load_model
from vae_dist.model.vae import count_parameters
from vae_dist.serve import schemas

api = FastAPI(title="vae_dist", version=__version__, description="Sample from a text VAE.")


@api.exception_handler(DataError)
async def refuse(request: Request, error: DataError) -> JSONResponse:
    """Text the model cannot take is the client's to mend."""
    return JSONResponse({"detail": error.message}, status_code=422)


@api.exception_handler(RequestValidationError)
async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
    """What is wrong and where, without echoing the input: it may be huge, NaN, or no valid Unicode."""
    found = [
        {"loc": [ascii(part) for part in e["loc"]], "msg": ascii(e["msg"]), "type": e["type"]} for e in error.errors()
    ]
    return JSONResponse({"detail": found}, status_code=422)


# Above the class: `serve.ingress` pickles the application, with what it refers to, when it is applied.
def _seed(body: schemas.DecodingOptions) -> int:
    return secrets.randbelow(2**31) if body.seed is None else body.seed


def _choice(index: int, text: str, row: Generated) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": _finish(row), "log_prob": row.log_prob}


def _finish(row: Generated) -> Literal["stop", "length"]:
    return "stop" if row.finished else "length"


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
@serve.ingress(api)
class TextVaeService:
    """One replica: one model, one decoding at a time, in a thread beside the event loop."""

    def __init__(self, model_path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._loaded = load_model(model_path, "cuda" if torch.cuda.is_available() else "cpu")
        self._model = TextModel(self._loaded.vae, self._loaded.tokenizer, self._loaded.max_tokens)
        self._name = str(self._loaded.info["provenance"].get("run", self._loaded.path.name))
        self._turn = asyncio.Lock()
        # The first decoding is slow: torch warms up here and not in a request.
        self._model.sample(1, 0, Decoding(max_tokens=2))

    @api.get("/healthz")
    async def healthz(self) -> schemas.Health:
        """The replica answers."""
        return schemas.Health()

    @api.get("/v1/info")
    async def info(self) -> schemas.InfoResponse:
        """Which model this is and what it accepts."""
        return schemas.InfoResponse(
            model=self._name,
            weights_sha256=self._loaded.weights_sha256,
            vae_dist_version=__version__,
            parameters=count_parameters(self._loaded.vae),
            latent_dim=self._loaded.vae.latent_dim,
            vocab_size=self._loaded.vae.vocab_size,
            max_tokens=self._loaded.max_tokens,
            prior=self._loaded.vae.prior_name,
            provenance=self._loaded.info["provenance"],
            limits={"rows": schemas.MAX_ROWS, "steps": schemas.MAX_STEPS, "characters": schemas.MAX_TEXT_CHARACTERS},
        )

    @api.post("/v1/sample")
    async def sample(self, body: schemas.SampleRequest) -> schemas.SampleResponse:
        """Texts drawn from the prior."""
        seed = _seed(body)
        texts, rows, z_BD = await self._run(self._model.sample, body.n, seed, self._decoding(body), body.prior_scale)
        latents = z_BD.tolist() if body.return_latent else [None] * body.n
        choices = [
            schemas.Choice(**_choice(i, text, row), latent=latent)
            for i, (text, row, latent) in enumerate(zip(texts, rows, latents, strict=True))
        ]
        return schemas.SampleResponse(**self._envelope(seed), choices=choices)

    @api.post("/v1/reconstruct")
    async def reconstruct(self, body: schemas.ReconstructRequest) -> schemas.ReconstructResponse:
        """Each input decoded from its posterior mean, with its score."""
        seed = _seed(body)
        texts, rows = await self._run(self._model.reconstruct, body.input, seed, self._decoding(body))
        scores = await self._run(score_texts, self._model, body.input, rows)
        choices = [
            schemas.Reconstruction(**_choice(i, text, row), input=given, **score)
            for i, (text, row, given, score) in enumerate(zip(texts, rows, body.input, scores, strict=True))
        ]
        return schemas.ReconstructResponse(**self._envelope(seed), choices=choices)

    @api.post("/v1/interpolate")
    async def interpolate(self, body: schemas.InterpolateRequest) -> schemas.InterpolateResponse:
        """Texts between two texts; the ends are their reconstructions."""
        seed = _seed(body)
        decoding = self._decoding(body)
        t, texts, rows = await self._run(self._model.interpolate, body.a, body.b, body.steps, body.path, seed, decoding)
        points = [
            schemas.Point(t=at, text=text, finish_reason=_finish(row), log_prob=row.log_prob)
            for at, text, row in zip(t, texts, rows, strict=True)
        ]
        return schemas.InterpolateResponse(**self._envelope(seed), a=body.a, b=body.b, path=body.path, points=points)

    async def _run(self, function: Any, *arguments: Any) -> Any:
        async with self._turn:
            return await asyncio.to_thread(function, *arguments)

    def _decoding(self, body: schemas.DecodingOptions) -> Decoding:
        longest = self._loaded.max_tokens
        longest = min(body.max_tokens or longest, longest)
        return Decoding(body.temperature, body.top_k, body.top_p, longest, body.allow_unknown)

    def _envelope(self, seed: int) -> dict[str, Any]:
        return {"model": self._name, "created": int(time.time()), "seed": seed}
