"""The latent endpoints: a real Ray Serve application, asked over HTTP, against the library."""

from __future__ import annotations

import base64
import json

import httpx
import numpy as np
import pytest
import torch

from vae_dist.decode.encode import likelihood
from vae_dist.decode.latent_ops import TextModel
from vae_dist.decode.request import Decoding

A, B, C = "the old sailor watched a small boat", "one tired teacher forgot the long road", "every tall engine"
GREEDY = Decoding(temperature=0.0, max_tokens=16)


def post(client: httpx.Client, path: str, **body: object) -> dict:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict = answer.json()
    return found


def test_what_encode_gives_decode_takes(client: httpx.Client, model: TextModel) -> None:
    data = post(client, "/v1/encode", input=[A, B])["data"]
    for one, text in zip(data, model.encode([A, B]), strict=True):
        assert one["mean"] == pytest.approx(text.mean.tolist()) and one["logvar"] == pytest.approx(text.logvar.tolist())
        assert one["tokens"] == len(text.ids) and not one["truncated"]
    texts = [c["text"] for c in post(client, "/v1/decode", latent=[one["mean"] for one in data])["choices"]]
    assert texts == [c["text"] for c in post(client, "/v1/reconstruct", input=[A, B])["choices"]]


def test_neighbors_are_at_their_distance_and_decode_to_their_texts(client: httpx.Client) -> None:
    answer = post(client, "/v1/neighbors", input=A, radius=1.5, n=5, seed=3)
    mean = np.array(post(client, "/v1/encode", input=[A])["data"][0]["mean"])
    assert [c["index"] for c in answer["choices"]] == list(range(5))
    for choice in answer["choices"]:
        assert choice["distance"] == pytest.approx(1.5, rel=1e-4)
        assert np.linalg.norm(np.array(choice["latent"]) - mean) == pytest.approx(1.5, rel=1e-4)
    again = post(client, "/v1/decode", latent=[c["latent"] for c in answer["choices"]])["choices"]
    assert [c["text"] for c in again] == [c["text"] for c in answer["choices"]]
    assert answer["reconstruction"] == post(client, "/v1/reconstruct", input=[A])["choices"][0]["text"]
    from_latent = post(client, "/v1/neighbors", latent=mean.tolist(), radius=1.5, n=5, seed=3)
    assert from_latent["choices"] == answer["choices"] and from_latent["input"] is None
    assert from_latent["reconstruction"] == answer["reconstruction"]


def test_an_analogy_is_the_sum_of_latents(client: httpx.Client, model: TextModel) -> None:
    answer = post(client, "/v1/analogy", a=A, b=B, c=C, strength=0.5)
    a, b, c = (text.mean for text in model.encode([A, B, C]))
    (choice,) = answer["choices"]
    assert choice["latent"] == pytest.approx((c + 0.5 * (b - a)).tolist(), abs=1e-5)
    assert answer["reconstructions"] == model.reconstruct([A, B, C], 0, GREEDY)[0]


def test_traverse_moves_one_dimension_alone(client: httpx.Client, model: TextModel) -> None:
    answer = post(client, "/v1/traverse", input=A, dimension=2, extent=2.0, steps=5)
    (text,) = model.encode([A])
    assert [c["value"] for c in answer["choices"]] == [-2.0, -1.0, 0.0, 1.0, 2.0]
    for choice in answer["choices"]:
        expected = text.mean.clone()
        expected[2] = choice["value"]
        assert choice["latent"] == pytest.approx(expected.tolist())
    assert answer["mean"] == pytest.approx(float(text.mean[2])) and answer["logvar"] == pytest.approx(
        float(text.logvar[2])
    )


def test_score_is_the_librarys(client: httpx.Client, model: TextModel) -> None:
    answer = post(client, "/v1/score", input=[A, "the " * 40], importance_samples=30)
    for one, expected in zip(answer["data"], likelihood(model.vae, model.encode([A, "the " * 40]), 30), strict=True):
        assert {key: one[key] for key in expected} == pytest.approx(expected)
        assert one["ppl"] == pytest.approx(np.exp(one["iw_nll"] / one["tokens"]))
    assert [one["truncated"] for one in answer["data"]] == [False, True]


def test_embeddings_are_posterior_means_in_both_formats(client: httpx.Client, model: TextModel) -> None:
    name, _ = [one["id"] for one in client.get("/v1/models").json()["data"]]
    means = torch.stack([text.mean for text in model.encode([A, B])]).numpy()
    answer = post(client, "/v1/embeddings", input=[A, B], model=name)
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], means, rtol=1e-5, atol=1e-6)
    packed = post(client, "/v1/embeddings", input=B, model=name, encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), dtype="<f4"), means[1], rtol=1e-5, atol=1e-6)
    assert answer["usage"]["prompt_tokens"] == sum(len(text.ids) for text in model.encode([A, B]))
    assert client.post("/v1/embeddings", json={"input": A, "model": "gpt-2"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/decode", {"latent": [[0.0, 1.0]]}, "2 dimensions; this model's have 4"),
        ("/v1/decode", {"latent": []}, "latent"),
        ("/v1/decode", {"latent": [[1e400, 0, 0, 0]]}, "latent"),
        ("/v1/decode", {"latent": [["x", 0, 0, 0]]}, "latent"),
        ("/v1/traverse", {"input": A, "dimension": 4}, "0 to 3"),
        ("/v1/neighbors", {"input": A, "radius": -1.0}, "radius"),
        ("/v1/neighbors", {"radius": 1.0}, "exactly one of input and latent"),
        ("/v1/neighbors", {"input": A, "latent": [0.0] * 4}, "exactly one of input and latent"),
        ("/v1/neighbors", {"latent": [0.0] * 5}, "5 dimensions; this model's have 4"),
        ("/v1/analogy", {"a": A, "b": B}, "c"),
        ("/v1/score", {"input": [A], "importance_samples": 501}, "500"),
        ("/v1/encode", {"input": [A] * 65}, "64"),
        ("/v1/sample", {"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_latent_requests_that_cannot_be_answered_are_refused_with_the_reason(
    client: httpx.Client, path: str, body: dict, named: str
) -> None:
    content = json.dumps(body).replace("Infinity", "1e400")
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and named in answer.text, answer.text
