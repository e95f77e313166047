"""The served endpoint: a real Ray Serve application, asked over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from vae_dist.decode.latent_ops import TextModel
from vae_dist.decode.request import Decoding
from vae_dist.export.model_dir import load_model


def test_sample_is_what_the_library_gives(client: httpx.Client, model: TextModel) -> None:
    answer = client.post("/v1/sample", json={"n": 4, "seed": 11, "temperature": 0.8, "return_latent": True}).json()
    texts, rows, z_BD = model.sample(4, 11, Decoding(temperature=0.8, max_tokens=16))
    assert answer["seed"] == 11 and [c["text"] for c in answer["choices"]] == texts
    for choice, row, z in zip(answer["choices"], rows, z_BD, strict=True):
        assert choice["log_prob"] == pytest.approx(row.log_prob, rel=1e-5)
        assert choice["latent"] == pytest.approx(z.tolist())
        assert choice["finish_reason"] == ("stop" if row.finished else "length")


def test_seed_is_echoed_and_reproduces_alone_and_in_company(client: httpx.Client) -> None:
    first = client.post("/v1/sample", json={"n": 5}).json()
    again = client.post("/v1/sample", json={"n": 5, "seed": first["seed"]}).json()
    assert again["choices"] == first["choices"]
    third = client.post("/v1/sample", json={"n": 1, "seed": first["seed"] + 2}).json()
    assert third["choices"][0]["text"] == first["choices"][2]["text"]


def test_many_at_once_get_what_each_gets_alone(client: httpx.Client) -> None:
    bodies = [{"n": 1 + i % 4, "seed": i, "temperature": 0.5 + i % 3, "top_k": 5 * (i % 2)} for i in range(60)]

    def ask(body: dict[str, float]) -> list[dict[str, object]]:
        choices: list[dict[str, object]] = client.post("/v1/sample", json=body).json()["choices"]
        return choices

    with ThreadPoolExecutor(30) as pool:
        together = list(pool.map(ask, bodies))
    assert together == [ask(body) for body in bodies]


def test_reconstruct_scores_and_reports_truncation(client: httpx.Client) -> None:
    texts = ["the old sailor watched a small boat", "the " * 40]
    choices = client.post("/v1/reconstruct", json={"input": texts}).json()["choices"]
    assert [c["truncated"] for c in choices] == [False, True]
    assert [c["input"] for c in choices] == texts
    for choice in choices:
        assert choice["nll_per_token"] > 0 and choice["kl_per_seq"] >= 0 and 0 <= choice["token_accuracy"] <= 1


def test_interpolation_ends_at_the_reconstructions(client: httpx.Client) -> None:
    a, b = "the old sailor watched a small boat", "one tired teacher forgot the long road"
    answer = client.post("/v1/interpolate", json={"a": a, "b": b, "steps": 5}).json()
    ends = client.post("/v1/reconstruct", json={"input": [a, b]}).json()["choices"]
    assert [p["t"] for p in answer["points"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [answer["points"][i]["text"] for i in (0, -1)] == [c["text"] for c in ends]


def test_info_names_the_model(client: httpx.Client, model_dir: Path) -> None:
    info = client.get("/v1/info").json()
    assert info["weights_sha256"] == load_model(model_dir).weights_sha256
    assert info["latent_dim"] == 4 and info["max_tokens"] == 16 and info["model"] == "seed-5"


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/sample", {"n": 0}, "n"),
        ("/v1/sample", {"n": 10_000}, "64"),
        ("/v1/sample", {"temprature": 1.0}, "temprature"),
        ("/v1/sample", {"temperature": -1.0}, "temperature"),
        ("/v1/sample", {"seed": 2**63}, "seed"),
        ("/v1/reconstruct", {"input": []}, "input"),
        ("/v1/reconstruct", {"input": ["   "]}, "no token"),
        ("/v1/interpolate", {"a": "x", "b": "y", "steps": 1}, "steps"),
        ("/v1/interpolate", {"a": "x"}, "b"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(client: httpx.Client, path: str, body: dict, named: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 422 and named in answer.text, answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/sample", b'{"temperature": NaN}'),
        ("/v1/sample", b'{"temperature": 1e999}'),
        ("/v1/sample", b'{"\\ud800": 1}'),
        ("/v1/sample", b'{"n": 1'),
        ("/v1/reconstruct", b'{"input": ["\\ud800"]}'),
        ("/v1/reconstruct", b'{"input": ["' + b"a" * 1_000_000 + b'"]}'),
    ],
)
def test_hostile_bodies_are_refused_briefly(client: httpx.Client, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and len(answer.content) < 2000, answer.text[:500]


def test_service_listens_on_loopback_only(client: httpx.Client) -> None:
    port = client.base_url.port
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    mine = [address for address in listening if int(address.split(":")[1], 16) == port]
    assert mine and all(address.startswith("0100007F") for address in mine), mine
