"""Requests of the HTTP service. Unknown fields are refused; limits are in the messages of the 422."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_ROWS = 64
MAX_SAMPLES = 500
MAX_LATENT = 4096
MAX_STEPS = 33
MAX_TEXT_CHARACTERS = 4096
MAX_NAME_CHARACTERS = 256


def _is_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text holds a lone surrogate, which is no character")
    return text


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS), AfterValidator(_is_unicode)]
InputText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARACTERS), AfterValidator(_is_unicode)]
Latent = Annotated[list[float], Field(min_length=1, max_length=MAX_LATENT)]
# Half of it keeps seed + index inside the signed 64 bits of the noise's counter.
Seed = Annotated[int, Field(ge=0, lt=2**62)]


def _example(body: dict[str, Any]) -> ConfigDict:
    """A body that `tests/serve/test_reference.py` sends; it is in the OpenAPI document."""
    return ConfigDict(json_schema_extra={"example": body})


class Request(BaseModel):
    """Closed to unknown fields; NaN and infinity are refused, and so is true in place of 1."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    model: Name | None = None
    """A name under /v1/models; by default the first."""


class DecodingOptions(Request):
    """How tokens are chosen."""

    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """0 is greedy."""
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Keep the k likeliest tokens; 0 is off."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Keep the likeliest tokens up to this mass."""
    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Default and upper bound: the model's longest sequence."""
    allow_unknown: bool = False
    """Let the model write `<unk>`; by default its mass goes to the other tokens."""
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Logits of tokens that the text has are divided by it where positive, multiplied where negative; 1 is off."""
    seed: Seed | None = None
    """Echoed in the answer and reproduces it; drawn at random when absent."""


class StreamOptions(DecodingOptions):
    """How tokens are chosen, and whether the answer comes in pieces."""

    stream: bool = False
    """Answer with server-sent events, as the texts are written."""


class SampleRequest(StreamOptions):
    """Texts from the prior; row i uses seed + i."""

    model_config = _example({"n": 3, "seed": 0, "temperature": 0.8})

    n: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 1
    """So many texts."""
    prior_scale: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """Multiplies the noise that z is made of: with a standard prior the standard deviation of z."""
    prior: Name | None = None
    """One of the model's `priors` under /v1/info, such as standard or fitted; by default the first."""
    return_latent: bool = False
    """Show z of each text."""


class ReconstructRequest(StreamOptions):
    """Each text decoded from its posterior mean."""

    model_config = _example({"input": ["the old sailor watched a small boat"]})

    input: Annotated[list[InputText], Field(min_length=1, max_length=MAX_ROWS)]
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0


class InterpolateRequest(StreamOptions):
    """Texts on the way from a to b."""

    model_config = _example(
        {"a": "the old sailor watched a small boat", "b": "one tired teacher forgot the long road", "steps": 5}
    )

    a: InputText
    b: InputText
    steps: Annotated[int, Field(ge=2, le=MAX_STEPS)] = 7
    path: Literal["linear", "slerp"] = "linear"
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0


class EncodeRequest(Request):
    """The posterior of each text."""

    model_config = _example({"input": ["the old sailor watched a small boat"]})

    input: Annotated[list[InputText], Field(min_length=1, max_length=MAX_ROWS)]


class DecodeRequest(StreamOptions):
    """Texts of latents that the caller brings; row i uses seed + i."""

    model_config = _example({"latent": [[0.5, -1.0, 0.0, 2.0]]})

    latent: Annotated[list[Latent], Field(min_length=1, max_length=MAX_ROWS)]
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0


class NeighborsRequest(DecodingOptions):
    """Texts around a text or a latent: points at a distance from the text's posterior mean, or from the latent."""

    model_config = _example({"input": "the old sailor watched a small boat", "radius": 2.0, "n": 5, "seed": 0})

    input: InputText | None = None
    latent: Latent | None = None
    """In place of `input`, such as the latent of a neighbor."""
    radius: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    """Distance in the latent space."""
    n: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 7
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0

    @model_validator(mode="after")
    def _has_one_centre(self) -> Self:
        if (self.input is None) == (self.latent is None):
            raise ValueError("give exactly one of input and latent")
        return self


class AnalogyRequest(DecodingOptions):
    """a is to b as c is to the answer."""

    model_config = _example({"a": "the old sailor", "b": "the old sailor in silence", "c": "every tall engine"})

    a: InputText
    b: InputText
    c: InputText
    strength: Annotated[float, Field(ge=-10.0, le=10.0)] = 1.0
    """How much of b - a is added to c."""
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0


class TraverseRequest(DecodingOptions):
    """A text with one dimension of its latent moved from -extent to extent."""

    model_config = _example({"input": "the old sailor watched a small boat", "dimension": 2})

    input: InputText
    dimension: Annotated[int, Field(ge=0, lt=MAX_LATENT)]
    extent: Annotated[float, Field(gt=0.0, le=100.0)] = 3.0
    steps: Annotated[int, Field(ge=2, le=MAX_STEPS)] = 7
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0


class ScoreRequest(Request):
    """How likely each text is."""

    model_config = _example({"input": ["the old sailor watched a small boat"], "importance_samples": 50})

    input: Annotated[list[InputText], Field(min_length=1, max_length=MAX_ROWS)]
    importance_samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 100
    """K of the importance-weighted bound."""


class EmbeddingsRequest(Request):
    """OpenAI's schema; the embedding is the posterior mean."""

    model_config = _example({"input": "the old sailor watched a small boat"})

    input: InputText | Annotated[list[InputText], Field(min_length=1, max_length=MAX_ROWS)]
    encoding_format: Literal["float", "base64"] = "float"
    """base64: little-endian float32."""
    user: str | None = None
    """Taken and not used."""
