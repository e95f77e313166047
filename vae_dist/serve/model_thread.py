"""One thread that owns a model: it steps the engine, and between steps does what else is asked of the model.

Requests come from event loops and share every step. What is asked item by item (texts to encode or to score) is
collected while the thread is busy, and done together.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, TypeVar

from vae_dist.decode.engine import DecodeEngine
from vae_dist.decode.request import Emitted, Generated, Request
from vae_dist.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")
Message = Emitted | list[Emitted] | Exception
# Done between two steps, so that those who wait for tokens do not wait long.
_ITEMS = 64
# Handed on together to a reader who is slower than the model, so that others have their turn in between.
_BATCH = 64


class ModelThread:
    """Runs until `stop`. A failing step fails the requests that were in it; the next ones are taken."""

    def __init__(self, engine: DecodeEngine) -> None:
        self._engine = engine
        self._sinks: dict[int, _Sink] = {}
        self._wanted = threading.Condition()
        self._orders: list[Callable[[], None]] = []
        self._items: dict[Callable[[Sequence[Any]], Sequence[Any]], list[tuple[Any, Future[Any]]]] = {}
        self._stopped = False
        self.pace = Pace()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    async def decode(self, requests: Sequence[Request]) -> list[Generated]:
        """All rows, when the last has ended. Cancelled, it frees their slots.

        Raises:
            OverloadedError: there is no room for all of them.
        """
        found: dict[int, Generated] = {}
        async for arrived in self._receive(requests, streaming=False):
            for row, part in arrived:
                assert isinstance(part, list)
                found[row] = Generated.of(part)
        return [found[row] for row in range(len(requests))]

    async def stream(self, requests: Sequence[Request]) -> AsyncGenerator[list[tuple[int, Emitted]], None]:
        """Tokens as they come, each with the number of its request: all that have come since the last were taken.

        Closed or cancelled, it frees their slots.

        Raises:
            OverloadedError: there is no room for all of them.
        """
        async with aclosing(self._receive(requests, streaming=True)) as batches:
            async for arrived in batches:
                yield [(row, one) for row, one in arrived if isinstance(one, Emitted)]

    async def each(self, function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
        """`function` of the items, together with what others want of the same function."""
        futures: list[Future[Result]] = [Future() for _ in items]
        with self._wanted:
            self._require_running()
            self._items.setdefault(function, []).extend(zip(items, futures, strict=True))
            self._wanted.notify()
        return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function`, between two steps."""
        future: Future[Result] = Future()
        self._order(lambda: _settle(future, lambda: function(*arguments)))
        return await asyncio.wrap_future(future)

    @property
    def running(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._stopped

    @property
    def load(self) -> tuple[int, int, int]:
        """Slots in use, requests that wait for one, and slots."""
        return self._engine.active, self._engine.waiting, self._engine.slots

    def stop(self) -> None:
        """End after the present step; what is under way fails."""
        with self._wanted:
            self._stopped = True
            self._wanted.notify()
        self._thread.join()

    async def _receive(
        self, requests: Sequence[Request], *, streaming: bool
    ) -> AsyncGenerator[list[tuple[int, Emitted | list[Emitted]]], None]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Message]]()
        sinks = [_Sink(loop, arrived, row, streaming) for row in range(len(requests))]
        accepted: Future[list[int]] = Future()
        self._order(lambda: _settle(accepted, lambda: self._submit(requests, sinks)))
        running = len(requests)
        try:
            await asyncio.wrap_future(accepted)
            while running:
                batch: list[tuple[int, Emitted | list[Emitted]]] = []
                while not batch or (len(batch) < _BATCH and not arrived.empty()):
                    row, message = await arrived.get()
                    if isinstance(message, Exception):
                        raise message
                    running -= isinstance(message, list) or message.finish is not None
                    batch.append((row, message))
                yield batch
        finally:
            if running:
                with self._wanted:
                    self._orders.append(lambda: self._forget(sinks))
                    self._wanted.notify()

    def _order(self, order: Callable[[], None]) -> None:
        with self._wanted:
            self._require_running()
            self._orders.append(order)
            self._wanted.notify()

    def _require_running(self) -> None:
        if self._stopped:
            raise _stopping()

    def _run(self) -> None:
        while not self._stopped:
            with self._wanted:
                self._wanted.wait_for(lambda: self._stopped or self._orders or self._items or not self._engine.idle)
                orders, self._orders = self._orders, []
            for order in orders:
                order()
            self._do_items()
            try:
                emitted = self._engine.step()
            except Exception as error:
                self._fail_all(error)
                continue
            self.pace.add(len(emitted))
            for one in emitted:
                sink = self._sinks[one.handle] if one.finish is None else self._sinks.pop(one.handle)
                sink.take(one)
        for order in self._orders:
            order()
        while self._items:
            self._do_items()
        self._fail_all(_stopping())

    def _submit(self, requests: Sequence[Request], sinks: Sequence[_Sink]) -> list[int]:
        """All of them, or none."""
        handles: list[int] = []
        try:
            for request in requests:
                handles.append(self._engine.submit(request))
        except Exception:
            for handle in handles:
                self._engine.cancel(handle)
            raise
        self._sinks.update(zip(handles, sinks, strict=True))
        return handles

    def _forget(self, sinks: Sequence[_Sink]) -> None:
        for handle in [handle for handle, sink in self._sinks.items() if sink in sinks]:
            del self._sinks[handle]
            self._engine.cancel(handle)

    def _do_items(self) -> None:
        with self._wanted:
            if not self._items:
                return
            function, waiting = self._items.popitem()
            now, later = waiting[:_ITEMS], waiting[_ITEMS:]
            if later:
                self._items[function] = later
        now = [one for one in now if not one[1].cancelled()]
        try:
            results = function([item for item, _ in now])
        except Exception:
            # One item's mistake is not its neighbours'.
            for item, future in now:
                _settle(future, lambda item=item: function([item])[0])  # type: ignore[misc]
            return
        for (_, future), result in zip(now, results, strict=True):
            _settle(future, lambda result=result: result)  # type: ignore[misc]

    def _fail_all(self, error: Exception) -> None:
        for handle, sink in self._sinks.items():
            self._engine.cancel(handle)
            sink.tell(error)
        self._sinks.clear()


class Pace:
    """Tokens given: all, and a second over the last ten."""

    _WINDOW_S = 10.0

    def __init__(self) -> None:
        self.tokens = 0
        self._steps: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        """So many tokens at this moment."""
        self.tokens += tokens
        now = time.monotonic()
        self._steps.append((now, tokens))
        while self._steps[0][0] < now - self._WINDOW_S:
            self._steps.popleft()

    def per_second(self) -> float:
        """Mean over the window."""
        since = time.monotonic() - self._WINDOW_S
        return sum(tokens for at, tokens in list(self._steps) if at >= since) / self._WINDOW_S


class _Sink:
    """Where the tokens of one request go: one by one, or all when the last has come."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[tuple[int, Message]], row: int, streaming: bool
    ) -> None:
        self._loop, self._queue, self._row, self._streaming = loop, queue, row, streaming
        self._taken: list[Emitted] = []

    def take(self, one: Emitted) -> None:
        if self._streaming:
            self.tell(one)
            return
        self._taken.append(one)
        if one.finish is not None:
            self.tell(self._taken)

    def tell(self, message: Message) -> None:
        # A loop that has ended has nobody who waits.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (self._row, message))


def _settle(future: Future[Result], make: Callable[[], Result]) -> None:
    """Give a future its result or its error, unless nobody waits for it any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = make()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _stopping() -> RunError:
    return RunError("The service is stopping. Ask again later.")
