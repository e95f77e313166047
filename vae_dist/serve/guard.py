"""Who may ask, how much and how often: an ASGI middleware in front of every endpoint.

Keys are compared by their SHA-256, all of them at every request and in constant time, so that neither the answer's time
nor a replica's memory tells a key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vae_dist.errors import ConfigError

KEYS_VARIABLE = "VAE_DIST_API_KEYS"
MAX_BODY_BYTES = 2**20
# A request has one of the replica's places from its first byte on.
BODY_SECONDS = 10.0
# The explorer's files hold nothing secret: it asks for a key when it asks the model.
_OPEN_PATHS = ("/", "/healthz", "/readyz")
_OPEN_FOLDER = "/explorer/"
_NAME_AND_KEY = re.compile(r"([\w.-]{1,64}):([\x21-\x7e]{16,512})")
_OTHERS = 0o077
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


@dataclass(frozen=True)
class Access:
    """The rules of a service.

    Attributes:
        keys: SHA-256 of each key by its owner's name; with none, whoever reaches the port may ask.
        requests_per_minute: of each key (without keys: of all together) at one replica; None: no limit.
    """

    keys: dict[str, bytes] = field(default_factory=dict)
    requests_per_minute: int | None = None

    def owner(self, authorization: str) -> str | None:
        """Whose key an Authorization header bears; None: nobody's."""
        scheme, _, key = authorization.partition(" ")
        digest, found = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest(), None
        for name, expected in self.keys.items():
            if hmac.compare_digest(digest, expected):
                found = name
        return found if scheme.lower() == "bearer" else None


def read_access(file: Path | None, requests_per_minute: int | None) -> Access:
    """Keys of a file, else of the environment variable VAE_DIST_API_KEYS; lines or commas part them, NAME:KEY each.

    Raises:
        ConfigError: a file that is missing or that others can read, or a line that is no NAME:KEY. Keys are not shown.
    """
    where = str(file) if file else KEYS_VARIABLE
    text = os.environ.get(KEYS_VARIABLE, "") if file is None else _read_private(file)
    keys: dict[str, bytes] = {}
    for number, entry in enumerate(filter(None, map(str.strip, re.split(r"[\n,]", text))), start=1):
        if entry.startswith("#"):
            continue
        match = _NAME_AND_KEY.fullmatch(entry)
        if match is None or match[1] in keys:
            raise ConfigError(
                f"{where}: entry {number} is no NAME:KEY, or its name is there twice. A name has letters, digits, . _ "
                "and -; a key at least 16 printable characters, such as of `openssl rand -hex 32`."
            )
        keys[match[1]] = hashlib.sha256(match[2].encode()).digest()
    if file is not None and not keys:
        raise ConfigError(f"{where} holds no key. Write NAME:KEY on a line of it.")
    return Access(keys, requests_per_minute)


def _read_private(file: Path) -> str:
    try:
        if file.stat().st_mode & _OTHERS:
            raise ConfigError(f"Others can read the keys in {file}. Run: chmod 600 {file}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The keys in {file} cannot be read: {error}.") from None


class Guard:
    """Refuses requests without a key, too many and too large ones, and puts security headers on every answer."""

    def __init__(self, app: Callable[..., Any], access: Access, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._access, self._clock = app, access, clock
        self._buckets: dict[str, tuple[float, float]] = {}

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """ASGI 3."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _with_security(message.get("headers", ()))}
            await send(message)

        headers = dict(scope["headers"])
        is_open = scope["path"] in _OPEN_PATHS or scope["path"].startswith(_OPEN_FOLDER)
        refusal = None if is_open else self._refusal(headers.get(b"authorization", b""))
        body, refusal = (b"", refusal) if refusal else await _read_body(headers, receive)
        if refusal:
            await refuse(send, *refusal)
            return
        replayed = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again() -> Any:
            return next(replayed, None) or await receive()

        await self._app(scope, receive_again, send_guarded)

    def _refusal(self, authorization: bytes) -> tuple[int, str, dict[str, str]] | None:
        owner = self._access.owner(authorization.decode("latin-1")) if self._access.keys else "everybody"
        if owner is None:
            return 401, "Give a key: Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"}
        seconds = self._seconds_to_wait(owner)
        if seconds:
            limit = f"{self._access.requests_per_minute} requests a minute"
            return 429, f"{limit} are the limit here. Ask again later.", {"Retry-After": str(math.ceil(seconds))}
        return None

    def _seconds_to_wait(self, owner: str) -> float:
        """Until a request of this owner is allowed; 0, and it is counted, where one is now (a token bucket)."""
        limit = self._access.requests_per_minute
        if limit is None:
            return 0.0
        now = self._clock()
        tokens, at = self._buckets.get(owner, (float(limit), now))
        tokens = min(float(limit), tokens + (now - at) * limit / 60.0)
        allowed = tokens >= 1.0
        self._buckets[owner] = (tokens - 1.0 if allowed else tokens, now)
        return 0.0 if allowed else (1.0 - tokens) * 60.0 / limit


async def _read_body(
    headers: dict[bytes, bytes], receive: Callable[..., Any]
) -> tuple[bytes, tuple[int, str, dict[str, str]] | None]:
    """The whole body, or the refusal of one that is too large or too slow: header and sender are not believed."""
    too_large = 413, f"The body is larger than {MAX_BODY_BYTES:,} bytes.", {"Connection": "close"}
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        return b"", too_large
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _collect(receive)
    except TimeoutError:
        return b"", (408, f"The body did not arrive within {BODY_SECONDS:g} s.", {"Connection": "close"})
    return (b"", too_large) if body is None else (body, None)


async def _collect(receive: Callable[..., Any]) -> bytes | None:
    """A body, or None where it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return bytes(body)


async def refuse(send: Callable[..., Any], status: int, detail: str, headers: dict[str, str]) -> None:
    """Answer with an error, as FastAPI words it, and the security headers."""
    body = json.dumps({"detail": detail}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": _with_security(raw)})
    await send({"type": "http.response.body", "body": body})


def _with_security(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    given = list(headers)
    names = {name.lower() for name, _ in given}
    return [*given, *(header for header in _HEADERS if header[0] not in names)]
