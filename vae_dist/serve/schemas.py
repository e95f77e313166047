"""Requests and responses of the HTTP service. Unknown fields are refused; limits are in the messages of the 422."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_ROWS = 64
MAX_STEPS = 33
MAX_TEXT_CHARACTERS = 4096


def _is_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text holds a lone surrogate, which is no character")
    return text


InputText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARACTERS), AfterValidator(_is_unicode)]
# Half of it keeps seed + index inside the signed 64 bits of the noise's counter.
Seed = Annotated[int, Field(ge=0, lt=2**62)]


class Request(BaseModel):
    """Closed to unknown fields; NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class DecodingOptions(Request):
    """How tokens are chosen."""

    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """0 is greedy."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep the k likeliest tokens; 0 is off."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Keep the likeliest tokens up to this mass."""
    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Default and upper bound: the model's longest sequence."""
    allow_unknown: bool = False
    """Let the model write <unk>; by default its mass goes to the other tokens."""
    seed: Seed | None = None
    """Echoed in the answer and reproduces it; drawn at random when absent."""


class SampleRequest(DecodingOptions):
    """Texts from the prior; row i uses seed + i."""

    n: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 1
    prior_scale: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """Multiplies the noise that z is made of: with a standard prior the standard deviation of z."""
    return_latent: bool = False


class ReconstructRequest(DecodingOptions):
    """Each text decoded from its posterior mean."""

    input: Annotated[list[InputText], Field(min_length=1, max_length=MAX_ROWS)]
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0


class InterpolateRequest(DecodingOptions):
    """Texts on the way from a to b."""

    a: InputText
    b: InputText
    steps: Annotated[int, Field(ge=2, le=MAX_STEPS)] = 7
    path: Literal["linear", "slerp"] = "linear"
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0


class Choice(BaseModel):
    """One text. `log_prob` is the sum over its tokens under the model's own distribution, nats."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    log_prob: float
    latent: list[float] | list[list[float]] | None = None
    """z; a list for each token where every token has a latent."""


class SampleResponse(BaseModel):
    """Answer of /v1/sample."""

    object: str = "vae.sample"
    model: str
    created: int
    seed: int
    choices: list[Choice]


class Reconstruction(Choice):
    """A reconstruction; `truncated` says that the input was longer than the model's maximum and was cut."""

    input: str
    truncated: bool
    token_accuracy: float
    nll_per_token: float
    kl_per_seq: float


class ReconstructResponse(BaseModel):
    """Answer of /v1/reconstruct."""

    object: str = "vae.reconstruction"
    model: str
    created: int
    seed: int
    choices: list[Reconstruction]


class Point(BaseModel):
    """A text on the path; t = 0 is the reconstruction of a, t = 1 that of b."""

    t: float
    text: str
    finish_reason: Literal["stop", "length"]
    log_prob: float


class InterpolateResponse(BaseModel):
    """Answer of /v1/interpolate."""

    object: str = "vae.interpolation"
    model: str
    created: int
    seed: int
    a: str
    b: str
    path: str
    points: list[Point]


class InfoResponse(BaseModel):
    """Answer of /v1/info."""

    model: str
    weights_sha256: str
    vae_dist_version: str
    parameters: int
    latent_dim: int
    vocab_size: int
    max_tokens: int
    prior: str
    provenance: dict[str, Any]
    limits: dict[str, int]


class Health(BaseModel):
    """Answer of /healthz."""

    status: Literal["ok"] = "ok"
