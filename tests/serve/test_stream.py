"""Answers in pieces: the texts, the scores and the order of the whole ones."""

from __future__ import annotations

import json

import httpx
import pytest
from service import events

A, B = "the old sailor watched a small boat", "one tired teacher forgot the long road"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/sample", {"n": 5, "seed": 3, "temperature": 1.2, "return_latent": True}),
        ("/v1/decode", {"latent": [[0.5, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]], "temperature": 0.9, "seed": 1}),
        ("/v1/reconstruct", {"input": [A, B, "the " * 40], "seed": 0}),
    ],
)
def test_the_pieces_make_the_whole_answer(client: httpx.Client, path: str, body: dict) -> None:
    whole = client.post(path, json=body).json()
    answer = client.post(path, json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert {event["object"] for event in found} == {whole["object"] + ".chunk"}
    assert {(event["seed"], event["model"]) for event in found} == {(whole["seed"], whole["model"])}
    pieces = [choice for event in found for choice in event["choices"]]
    assert all(len({piece["index"] for piece in event["choices"]}) == len(event["choices"]) for event in found)
    for choice in whole["choices"]:
        own = [piece for piece in pieces if piece["index"] == choice["index"]]
        # Only the last says how it ended.
        assert ["finish_reason" in piece for piece in own] == [False] * (len(own) - 1) + [True]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        expected = {name: value for name, value in choice.items() if name != "text" and value is not None}
        assert {name: value for name, value in own[-1].items() if name != "text"} == expected


def test_points_come_one_by_one_and_in_order(client: httpx.Client) -> None:
    body = {"a": A, "b": B, "steps": 9, "path": "slerp", "seed": 0}
    whole = client.post("/v1/interpolate", json=body).json()
    found = events(client.post("/v1/interpolate", json={**body, "stream": True}).text)
    assert [len(event["points"]) for event in found] == [1] * 9
    assert [event["points"][0] for event in found] == whole["points"]


def test_the_first_piece_comes_before_the_last_token_is_written(client: httpx.Client) -> None:
    body = {"n": 1, "seed": 0, "stream": True}
    with client.stream("POST", "/v1/sample", json=body) as answer:
        chunks = [chunk for chunk in answer.iter_raw() if chunk]
    assert len(chunks) > 2, "one by one, not collected on the way"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/decode", {"latent": [[1.0]]}, 422),
        ("/v1/sample", {"prior": "fitted"}, 422),
        ("/v1/sample", {"model": "other"}, 404),
        ("/v1/reconstruct", {"input": ["  "]}, 422),
    ],
)
def test_what_cannot_be_answered_is_refused_before_the_stream(
    client: httpx.Client, path: str, body: dict, status: int
) -> None:
    answer = client.post(
        path, content=json.dumps({**body, "stream": True}), headers={"content-type": "application/json"}
    )
    assert answer.status_code == status and answer.headers["content-type"] == "application/json"


def test_a_prior_is_chosen_by_name(client: httpx.Client) -> None:
    body = {"n": 3, "seed": 5}
    usual = client.post("/v1/sample", json=body).json()["choices"]
    assert client.get("/v1/info").json()["priors"] == ["standard"]
    assert client.post("/v1/sample", json={**body, "prior": "standard"}).json()["choices"] == usual
    refused = client.post("/v1/sample", json={**body, "prior": "fitted"})
    assert refused.status_code == 422 and "it has: standard" in refused.text
