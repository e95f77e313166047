"""How fast the service is: its whole path at saturation beside the bare engine, and the wait for a first token.

Called by decode_speed.py. The service is `vae-dist serve` on a Ray of its own; the clients, in this process, speak
HTTP/1.1 over sockets and do nothing else, but they and Ray's proxy share the machine with the model.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer as Inner
from tokenizers import models

from vae_dist.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from vae_dist.export.model_dir import write_model
from vae_dist.model.vae import TextVAE


def measure(
    vae: TextVAE, engine: Callable[[], int], length: int, slots: int, rounds: int, seconds: float, threads: int
) -> dict[str, Any]:
    """Tokens a second of the engine and of the service, in turns; then first tokens at half the service's pace."""
    with tempfile.TemporaryDirectory() as folder, _served(_export(vae, Path(folder), length), slots, threads) as port:
        speeds: dict[str, list[float]] = {"engine": [], "HTTP, a text a request": [], "HTTP, 16 texts": []}
        for round_ in range(rounds + 1):
            for name, values in speeds.items():
                if name == "engine":
                    began = time.perf_counter()
                    pace = engine() / (time.perf_counter() - began)
                else:
                    texts = 16 if "16" in name else 1
                    pace = asyncio.run(_saturate(port, 2 * slots // texts, texts, length, seconds))
                if round_:
                    values.append(pace)
        median = {name: statistics.median(values) for name, values in speeds.items()}
        for name, values in speeds.items():
            print(f"  {name:24} {median[name]:9.0f} tokens/s   ({min(values):.0f} to {max(values):.0f})")
        requests_per_second = 0.5 * median["HTTP, a text a request"] / (0.75 * length)
        waits = sorted(asyncio.run(_arrive(port, requests_per_second, length, 3 * seconds)))
    p50, p99 = (1000 * waits[int(share * (len(waits) - 1))] for share in (0.5, 0.99))
    print(f"  first token at {requests_per_second:.0f} requests/s: p50 {p50:.0f} ms, p99 {p99:.0f} ms of {len(waits)}")
    return {
        "http_vs_engine": round(median["HTTP, 16 texts"] / median["engine"], 2),
        "http_vs_engine_one_text": round(median["HTTP, a text a request"] / median["engine"], 2),
        "ttft_p50_ms": round(p50, 1),
        "ttft_p99_ms": round(p99, 1),
    }


def _export(vae: TextVAE, folder: Path, length: int) -> Path:
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(len(SPECIAL_TOKENS), vae.vocab_size))]
    inner = Inner(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    write_model(folder / "model", vae.state_dict(), vae.config, Tokenizer(inner.to_str().encode()), length, {})
    return folder / "model"


@contextmanager
def _served(model: Path, slots: int, threads: int) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = model.parent / "serve.yaml"
    settings.write_text(f"models: {{bench: {model}}}\nslots: {slots}\nthreads: {threads}\nport: {port}\n")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "vae_dist", "serve", "--config", str(settings)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        while True:
            assert process.poll() is None, process.communicate()[1]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> float:
    """Until the answer's end; returns how long its first byte after the headers took."""
    content, began = json.dumps(body), time.perf_counter()
    head = "POST /v1/sample HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
    headers = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in headers, headers
    fields = dict(line.lower().split(b": ", 1) for line in headers.split(b"\r\n")[1:] if b": " in line)
    first = 0.0
    if b"content-length" in fields:
        await reader.readexactly(int(fields[b"content-length"]))
        return time.perf_counter() - began
    while True:
        size = int(await reader.readuntil(b"\r\n"), 16)
        await reader.readexactly(size + 2)
        first = first or time.perf_counter() - began
        if not size:
            return first


async def _saturate(port: int, clients: int, texts: int, length: int, seconds: float) -> float:
    """Tokens a second that so many clients get, each of which asks again as soon as it is answered."""
    until = time.perf_counter() + seconds
    tokens = 0

    async def one(number: int) -> None:
        nonlocal tokens
        lengths = random.Random(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < until:
            limit = lengths.randint(length // 2, length)
            await _ask(reader, writer, {"n": texts, "max_tokens": limit, "seed": number})
            tokens += texts * limit
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*map(one, range(clients)))
    return tokens / (time.perf_counter() - began)


async def _arrive(port: int, requests_per_second: float, length: int, seconds: float) -> list[float]:
    """Waits for the first event, of requests that arrive at random (Poisson) whatever those before them do."""
    chance = random.Random(0)
    waits: list[float] = []

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        limit = chance.randint(length // 2, length)
        waits.append(await _ask(reader, writer, {"max_tokens": limit, "seed": number, "stream": True}))
        writer.close()

    until, tasks = time.perf_counter() + seconds, []
    while time.perf_counter() < until:
        tasks.append(asyncio.create_task(one(len(tasks))))
        await asyncio.sleep(chance.expovariate(requests_per_second))
    await asyncio.gather(*tasks)
    return waits
