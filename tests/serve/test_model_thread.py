"""The thread that owns a model: many share its steps, leave when they like, and do not harm each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
import torch

from vae_dist.config.model_schema import LstmConfig, ModelConfig
from vae_dist.data.text.special_ids import EOS_ID
from vae_dist.decode.engine import DecodeEngine
from vae_dist.decode.request import Decoding, Request
from vae_dist.errors import DataError, OverloadedError, RunError
from vae_dist.model.vae import TextVAE
from vae_dist.serve.model_thread import ModelThread

LENGTH = 30


@pytest.fixture
def engine() -> DecodeEngine:
    torch.manual_seed(0)
    part = LstmConfig(hidden_dim=16)
    vae = TextVAE(ModelConfig(embedding_dim=8, latent_dim=4, encoder=part, decoder=part), 50).eval()
    vae.output_bias.data[EOS_ID] = -50.0
    return DecodeEngine(vae, LENGTH, slots=8, queue=8)


@pytest.fixture
def thread(engine: DecodeEngine) -> Iterator[ModelThread]:
    thread = ModelThread(engine)
    yield thread
    thread.stop()


def requests(count: int, first: int = 0, tokens: int = LENGTH) -> list[Request]:
    return [Request(torch.full((4,), 0.1 * i), i, Decoding(max_tokens=tokens)) for i in range(first, first + count)]


def test_many_callers_share_an_engine_and_get_their_own_rows(engine: DecodeEngine, thread: ModelThread) -> None:
    async def ask() -> list[Any]:
        return await asyncio.gather(*(thread.decode(requests(2, 10 * i)) for i in range(8)))

    together = asyncio.run(ask())
    for i, rows in enumerate(together):
        assert rows == asyncio.run(thread.decode(requests(2, 10 * i)))
        assert [len(row.tokens) for row in rows] == [LENGTH] * 2
    assert len({tuple(row.tokens) for rows in together for row in rows}) == 16


def test_a_stream_gives_the_tokens_of_the_whole_one_by_one(thread: ModelThread) -> None:
    async def read() -> dict[int, list[int]]:
        found: dict[int, list[int]] = {0: [], 1: []}
        async for arrived in thread.stream(requests(2)):
            for row, one in arrived:
                found[row].append(one.token)
        return found

    whole = asyncio.run(thread.decode(requests(2)))
    assert asyncio.run(read()) == {0: whole[0].tokens, 1: whole[1].tokens}


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_who_leaves_in_the_middle_frees_the_slots(engine: DecodeEngine, thread: ModelThread, how: str) -> None:
    reached = threading.Event()
    step, steps = engine.step, []

    def counted() -> Any:
        steps.append(len(engine._rows))
        if len(steps) == 3:
            reached.set()
        return step()

    engine.step = counted  # type: ignore[method-assign]

    async def leave() -> None:
        if how == "closed":
            async with aclosing(thread.stream(requests(8))) as stream:
                async for _ in stream:
                    break
        else:
            task = asyncio.create_task(thread.decode(requests(8)))
            await asyncio.to_thread(reached.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        # Whoever comes next finds room.
        await thread.decode(requests(16, tokens=1))

    asyncio.run(leave())
    assert engine.idle and not thread._sinks
    assert len(steps) < LENGTH


def test_who_finds_no_room_is_told_and_takes_none(engine: DecodeEngine, thread: ModelThread) -> None:
    async def ask() -> list[Any]:
        first = asyncio.create_task(thread.decode(requests(16)))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await thread.decode(requests(17))
        return await first

    assert len(asyncio.run(ask())) == 16 and engine.idle


def test_a_step_that_fails_fails_who_was_in_it_and_no_later_one(engine: DecodeEngine, thread: ModelThread) -> None:
    step = engine.step

    def broken() -> Any:
        raise FloatingPointError("no")

    engine.step = broken  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError):
        asyncio.run(thread.decode(requests(3)))
    engine.step = step  # type: ignore[method-assign]
    assert engine.idle and len(asyncio.run(thread.decode(requests(3)))) == 3


def test_items_of_many_callers_are_done_together_and_a_bad_one_fails_alone(thread: ModelThread) -> None:
    calls: list[int] = []
    hold = threading.Event()

    def double(items: Sequence[int]) -> list[int]:
        calls.append(len(items))
        if 13 in items:
            raise DataError("13 is unlucky")
        return [2 * item for item in items]

    async def ask() -> None:
        blocked = asyncio.create_task(thread.call(hold.wait, 10))
        await asyncio.sleep(0.05)
        good = [asyncio.create_task(thread.each(double, [i, i + 100])) for i in range(10)]
        await asyncio.sleep(0.05)
        hold.set()
        await blocked
        assert await asyncio.gather(*good) == [[2 * i, 2 * i + 200] for i in range(10)]
        assert calls == [20]
        bad, fine = await asyncio.gather(thread.each(double, [13]), thread.each(double, [4]), return_exceptions=True)
        assert isinstance(bad, DataError) and fine == [8]

    asyncio.run(ask())


def test_stopping_fails_what_is_under_way_and_what_comes_later(engine: DecodeEngine) -> None:
    thread = ModelThread(engine)
    begun, step = threading.Event(), engine.step

    def slow() -> Any:
        begun.set()
        threading.Event().wait(0.02)
        return step()

    engine.step = slow  # type: ignore[method-assign]

    async def ask() -> None:
        task = asyncio.create_task(thread.decode(requests(2)))
        await asyncio.to_thread(begun.wait, 10)
        await asyncio.to_thread(thread.stop)
        with pytest.raises(RunError, match="stopping"):
            await task
        with pytest.raises(RunError, match="stopping"):
            await thread.decode(requests(1))

    asyncio.run(ask())
