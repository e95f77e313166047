"""Answers in pieces: server-sent events (the HTML standard, section 9.2), ended by `[DONE]` as OpenAI's are."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from vae_dist.data.text.pieces import Pieces
from vae_dist.decode.request import Emitted, Generated, Request
from vae_dist.errors import VaeDistError
from vae_dist.serve.models import ServedModel
from vae_dist.serve.response_schemas import ErrorEvent, Piece

MEDIA_TYPE = "text/event-stream"
_DONE = b"data: [DONE]\n\n"
_LOG = logging.getLogger("ray.serve")


async def pieces(
    model: ServedModel,
    requests: Sequence[Request],
    rest: Callable[[int, Generated], Awaitable[dict[str, Any]]],
) -> AsyncGenerator[list[Piece], None]:
    """The texts of requests as they are written; `rest` is what the last piece of a row has besides."""
    written = [Pieces(model.loaded.tokenizer) for _ in requests]
    emitted: list[list[Emitted]] = [[] for _ in requests]
    async with aclosing(model.thread.stream(requests)) as batches:
        async for arrived in batches:
            found: dict[int, Piece] = {}
            for index, one in arrived:
                emitted[index].append(one)
                piece = found.setdefault(index, Piece(index=index, text=""))
                piece.text += written[index].add(one.token, one.finish is not None)
                if one.finish is not None:
                    row = Generated.of(emitted[index])
                    ending = {"finish_reason": one.finish, "log_prob": row.log_prob, **await rest(index, row)}
                    found[index] = piece.model_copy(update=ending)
            if told := [piece for piece in found.values() if piece.text or piece.finish_reason]:
                yield told


async def in_order(model: ServedModel, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Generated], None]:
    """Whole rows, the first one first, each as soon as those before it have ended."""
    emitted: list[list[Emitted]] = [[] for _ in requests]
    following = 0
    async with aclosing(model.thread.stream(requests)) as batches:
        async for arrived in batches:
            for index, one in arrived:
                emitted[index].append(one)
            while following < len(requests) and emitted[following] and emitted[following][-1].finish is not None:
                yield following, Generated.of(emitted[following])
                following += 1


class EventStream(StreamingResponse):
    """Sends events as they come and, whatever ends it, closes their source, which frees what it holds."""

    media_type = MEDIA_TYPE

    def __init__(self, first: BaseModel, events: AsyncGenerator[BaseModel, None]) -> None:
        """See `answer_with`."""
        self._source = events
        # Proxies such as nginx would collect the events.
        super().__init__(_encoded(first, events), headers={"X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI 3."""
        async with aclosing(self._source):
            await super().__call__(scope, receive, send)


async def answer_with(events: AsyncGenerator[BaseModel, None]) -> EventStream:
    """A response that begins with the first event, so that what is refused before it has its own status."""
    return EventStream(await anext(events), events)


def error_event(detail: str) -> bytes:
    """What a stream that failed ends with."""
    return b"event: error\n" + _event(ErrorEvent(detail=detail))


async def _encoded(first: BaseModel, events: AsyncIterator[BaseModel]) -> AsyncGenerator[bytes, None]:
    yield _event(first)
    try:
        async for event in events:
            yield _event(event)
    except Exception as error:
        if isinstance(error, VaeDistError):
            yield error_event(error.message)
        else:
            _LOG.exception("A stream failed.")
            yield error_event("The service failed.")
    else:
        yield _DONE


def _event(content: BaseModel) -> bytes:
    # JSON has no line end outside of its strings, and inside they are escaped.
    return b"data: " + content.model_dump_json(exclude_none=True).encode() + b"\n\n"
