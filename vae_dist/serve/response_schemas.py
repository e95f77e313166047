"""Responses of the HTTP service, whole and, of those that come in pieces, their events."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Response(BaseModel):
    """What stands under a field says what it is."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Choice(Response):
    """One text. `log_prob` is the sum over its tokens under the model's own distribution, nats."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    log_prob: float
    latent: list[float] | list[list[float]] | None = None
    """z; a list for each token where every token has a latent."""


class Piece(Response):
    """Some more of one text: the texts of all pieces of an index make the whole, to the letter.

    The last one has `finish_reason` and what a whole answer's choice has besides.
    """

    model_config = ConfigDict(extra="allow")

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    log_prob: float | None = None


class PiecesEvent(Response):
    """An event of a streamed /v1/sample, /v1/decode or /v1/reconstruct; `object` is the whole's with `.chunk` added.

    It has one piece of each text that got further since the event before.
    """

    object: str
    model: str
    created: int
    seed: int
    choices: list[Piece]


class ErrorEvent(Response):
    """The last event of a stream that failed; its name is `error`."""

    detail: str


class SampleResponse(Response):
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


class ReconstructResponse(Response):
    """Answer of /v1/reconstruct."""

    object: str = "vae.reconstruction"
    model: str
    created: int
    seed: int
    choices: list[Reconstruction]


class Point(Response):
    """A text on the path; t = 0 is the reconstruction of a, t = 1 that of b."""

    t: float
    text: str
    finish_reason: Literal["stop", "length"]
    log_prob: float


class InterpolateResponse(Response):
    """Answer of /v1/interpolate."""

    object: str = "vae.interpolation"
    model: str
    created: int
    seed: int
    a: str
    b: str
    path: str
    points: list[Point]


class PointEvent(Response):
    """An event of a streamed /v1/interpolate: one point, in order."""

    object: str = "vae.interpolation.chunk"
    model: str
    created: int
    seed: int
    points: list[Point]


class Encoding(Response):
    """The posterior of a text: mean and log-variance, a list for each token where every token has a latent."""

    index: int
    mean: list[float] | list[list[float]]
    logvar: list[float] | list[list[float]]
    tokens: int
    truncated: bool


class EncodeResponse(Response):
    """Answer of /v1/encode."""

    object: str = "vae.encoding"
    model: str
    created: int
    data: list[Encoding]


class DecodeResponse(Response):
    """Answer of /v1/decode."""

    object: str = "vae.decoding"
    model: str
    created: int
    seed: int
    choices: list[Choice]


class Neighbor(Choice):
    """A text, its latent, and how far that is from the centre's."""

    distance: float


class NeighborsResponse(Response):
    """Answer of /v1/neighbors; `reconstruction` is the text of the centre: the input's own latent, or the one given."""

    object: str = "vae.neighbors"
    model: str
    created: int
    seed: int
    input: str | None
    reconstruction: str
    choices: list[Neighbor]


class AnalogyResponse(Response):
    """Answer of /v1/analogy; `reconstructions` are those of a, b and c."""

    object: str = "vae.analogy"
    model: str
    created: int
    seed: int
    reconstructions: list[str]
    choices: list[Choice]


class Step(Choice):
    """A text, and the value that the dimension has there."""

    value: float


class TraverseResponse(Response):
    """Answer of /v1/traverse; `mean` and `logvar` are the input's own in that dimension."""

    object: str = "vae.traversal"
    model: str
    created: int
    seed: int
    dimension: int
    mean: float
    logvar: float
    choices: list[Step]


class Score(Response):
    """Nats: the ELBO, its KL, and minus the importance-weighted bound; perplexity per token by the bound."""

    index: int
    tokens: int
    truncated: bool
    elbo: float
    kl: float
    iw_nll: float
    ppl: float


class ScoreResponse(Response):
    """Answer of /v1/score."""

    object: str = "vae.score"
    model: str
    created: int
    importance_samples: int
    data: list[Score]


class Embedding(Response):
    """As OpenAI has it."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(Response):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Response):
    """Answer of /v1/embeddings, as OpenAI has it."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Model(Response):
    """As OpenAI has it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["vae_dist"] = "vae_dist"


class ModelsResponse(Response):
    """Answer of /v1/models, as OpenAI has it."""

    object: Literal["list"] = "list"
    data: list[Model]


class MapPoint(Response):
    """A text, where it lies on the map, and its posterior mean."""

    text: str
    source: str
    """The data set that it is from."""
    tokens: int
    kl: float
    """Nats, as /v1/score has it."""
    at: tuple[float, float]
    """x and y."""
    latent: list[float]
    """The posterior mean."""


class MapResponse(Response):
    """Answer of /v1/map: the plane of largest variance through posterior means.

    There are no points where the service was given no texts, or the model has no one latent for each.

    The place (x, y) is the latent centre + x axes[0] + y axes[1], scaled to unit length where `on_sphere`.
    """

    object: str = "vae.map"
    on_sphere: bool
    centre: list[float]
    axes: list[list[float]]
    shares: list[float]
    """Of the variance of the posterior means, along each axis."""
    points: list[MapPoint]


class InfoResponse(Response):
    """Answer of /v1/info."""

    model: str
    weights_sha256: str
    vae_dist_version: str
    parameters: int
    latent_dim: int
    vocab_size: int
    max_tokens: int
    prior: str
    """What samples are drawn from."""
    priors: list[str]
    """Names for the field `prior` of /v1/sample, the usual one first."""
    provenance: dict[str, Any]
    limits: dict[str, int]
    reload_problem: str | None
    """Why what now lies in the model's directory was not taken up; null where it was."""


class Health(Response):
    """Answer of /healthz and /readyz."""

    status: Literal["ok"] = "ok"
