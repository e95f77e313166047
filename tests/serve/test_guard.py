"""Who may ask, how much and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from vae_dist.errors import ConfigError
from vae_dist.serve.guard import MAX_BODY_BYTES, Access, Guard, read_access

ALICE, BOB = "alice-has-a-long-key", "bob-has-another-key!"


async def _echo(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"cache-control", b"max-age=1")]})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return read_access(keys_file(tmp_path, f"alice:{ALICE}\n\nbob:{BOB}\n"), 2)


def keys_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def ask(guard: Guard, path: str = "/v1/sample", key: str | None = None, **how: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://test") as client:  # type: ignore[arg-type]
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return await client.post(path, **{"headers": headers, **how})

    return asyncio.run(once())


def guarded(access: Access, clock: Callable[[], float] | None = None) -> Guard:
    return Guard(_echo, access, clock or Clock())


def test_a_request_needs_a_key_that_is_known(access: Access) -> None:
    guard = guarded(access)
    for wrong in (None, "", ALICE[:-1], ALICE + "x", "alice", f"alice:{ALICE}", "é"):
        answer = ask(guard, key=wrong) if wrong != "é" else ask(guard, headers={"authorization": b"Bearer \xe9"})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", wrong
    assert ask(guard, key=ALICE).status_code == 200
    assert ask(guard, headers={"authorization": f"Basic {ALICE}"}).status_code == 401
    assert ask(guard, "/healthz").status_code == 200, "who watches needs no key"


def test_the_guard_opens_the_page_and_its_files_alone(access: Access) -> None:
    guard = guarded(access)
    assert [ask(guard, path).status_code for path in ("/", "/explorer/explorer.js")] == [200, 200]
    assert [ask(guard, path).status_code for path in ("/explorerx", "/v1/explorer/")] == [401, 401]


def test_each_key_has_its_own_rate(access: Access) -> None:
    clock = Clock()
    guard = guarded(access, clock)
    assert [ask(guard, key=ALICE).status_code for _ in range(3)] == [200, 200, 429]
    assert ask(guard, key=BOB).status_code == 200
    # Two a minute: the next is there after thirty seconds.
    assert ask(guard, key=ALICE).headers["retry-after"] == "30"
    clock.now = 29.0
    assert ask(guard, key=ALICE).status_code == 429
    clock.now = 30.5
    assert [ask(guard, key=ALICE).status_code for _ in range(2)] == [200, 429]
    # What was not asked for is not saved up beyond the limit.
    clock.now = 10_000.0
    assert [ask(guard, key=ALICE).status_code for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_is_taken_up_to_the_limit_whatever_its_header_says(announced: bool) -> None:
    guard = guarded(Access())

    def body(size: int) -> Any:
        async def chunks() -> Any:
            for start in range(0, size, 60_000):
                yield b"x" * min(60_000, size - start)

        return b"x" * size if announced else chunks()

    fits = ask(guard, content=body(MAX_BODY_BYTES))
    assert (fits.status_code, fits.text) == (200, str(MAX_BODY_BYTES))
    too_large = ask(guard, content=body(MAX_BODY_BYTES + 1))
    assert too_large.status_code == 413 and "1,048,576" in too_large.text


def test_every_answer_has_the_security_headers_once(access: Access) -> None:
    for answer in (ask(guarded(access)), ask(guarded(Access()))):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    # What an endpoint says itself stays.
    assert ask(guarded(Access())).headers.get_list("cache-control") == ["max-age=1"]


@pytest.mark.parametrize(
    ("text", "mode", "named"),
    [
        ("alice:short", 0o600, "entry 1"),
        (f"alice:{ALICE}\nalice:{BOB}", 0o600, "entry 2"),
        (f"{ALICE}", 0o600, "NAME:KEY"),
        ("# nobody", 0o600, "no key"),
        (f"alice:{ALICE}", 0o644, "chmod 600"),
    ],
)
def test_a_file_that_holds_no_keys_is_refused_and_shows_none(tmp_path: Path, text: str, mode: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as refused:
        read_access(keys_file(tmp_path, text, mode), None)
    assert ALICE not in str(refused.value) and "short" not in str(refused.value)


def test_keys_come_from_the_environment_where_no_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_DIST_API_KEYS", f"alice:{ALICE},bob:{BOB}")
    access = read_access(None, None)
    assert access.owner(f"Bearer {BOB}") == "bob" and access.owner(f"bearer {ALICE}") == "alice"
    assert ALICE not in repr(access)
    monkeypatch.delenv("VAE_DIST_API_KEYS")
    assert read_access(None, None).keys == {}


def test_the_service_asks_for_a_key(client: httpx.Client) -> None:
    for headers in ({"authorization": ""}, {"authorization": "Bearer wrong"}):
        answer = client.post("/v1/sample", json={"n": 1}, headers=headers)
        assert answer.status_code == 401 and "Bearer KEY" in answer.text
    assert client.get("/readyz", headers={"authorization": ""}).status_code == 200
    answer = client.post("/v1/sample", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert client.get("/v1/info").headers["x-frame-options"] == "DENY"


def test_without_keys_only_this_machine_is_served(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from vae_dist.cli import main

    assert main(["serve", f"a={tmp_path}", "--host", "0.0.0.0"]) == 2
    assert "--keys FILE" in capfd.readouterr().err
