"""What every request to `/v1/` passes first: it is counted, limited in time, and refused while the replica ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from vae_dist.serve.events import MEDIA_TYPE, error_event
from vae_dist.serve.guard import refuse
from vae_dist.serve.measures import Measures

_LEFT = 499


class Gate:
    """An ASGI middleware in front of all others. `/v1/...` is what takes time; the rest is asked by who watches."""

    def __init__(self, app: Callable[..., Any], timeout_s: float, endpoints: Sequence[str], measures: Measures) -> None:
        self._app, self._timeout_s, self._endpoints, self._measures = app, timeout_s, frozenset(endpoints), measures
        self._under_way, self._idle = 0, asyncio.Event()
        self.draining = False

    async def drain(self) -> None:
        """Refuse what comes from now on; returns when what was under way has ended."""
        self.draining = True
        if self._under_way:
            await self._idle.wait()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """ASGI 3."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        answer = _Answer(receive, send)
        self._under_way += 1
        try:
            if self.draining:
                await refuse(answer.send, 503, "The service is stopping. Ask again later.", {"Retry-After": "5"})
                return
            async with asyncio.timeout(self._timeout_s):
                await self._app(scope, answer.receive, answer.send)
        except TimeoutError:
            await self._end_late(answer)
        except asyncio.CancelledError:
            # The client is gone, or the replica ends.
            answer.status = _LEFT
            raise
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
                self._idle.clear()
            endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
            self._measures.request(endpoint, answer.status or 500, time.monotonic() - answer.began, answer.first_s)

    async def _end_late(self, answer: _Answer) -> None:
        late = f"The answer took longer than {self._timeout_s:g} s. Ask for less, or again later."
        if answer.status is None:
            await refuse(answer.send, 504, late, {})
        elif answer.is_stream:
            await answer.send({"type": "http.response.body", "body": error_event(late)})
            answer.status = 504
        else:
            raise TimeoutError(late)


class _Answer:
    """What was sent of an answer, and when."""

    def __init__(self, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        self._receive, self._send, self.began = receive, send, time.monotonic()
        self.status: int | None = None
        self.is_stream = False
        self.first_s: float | None = None

    async def receive(self) -> Any:
        message = await self._receive()
        # A stream ends without an error when its reader is gone.
        if message["type"] == "http.disconnect":
            self.status = _LEFT
        return message

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self.is_stream = kind.startswith(MEDIA_TYPE.encode())
        elif self.is_stream and self.first_s is None:
            self.first_s = time.monotonic() - self.began
        await self._send(message)
