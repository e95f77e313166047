"""A service as a process of its own, and what its tests ask of it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from support import RayCluster, free_port, start_command, wait_for

from vae_dist.config.model_schema import LstmConfig, ModelConfig
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.text.special_ids import EOS_ID
from vae_dist.export.model_dir import write_model
from vae_dist.model.vae import TextVAE

KEY = "0123456789abcdef-for-tests"


@contextmanager
def serving(cluster: RayCluster, *arguments: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """`vae-dist serve` with these arguments, once it is ready; a cluster has one at a time."""
    port = free_port()
    command = [sys.executable, "-m", "vae_dist", "serve", *arguments, "--port", str(port)]
    process = start_command(command, cluster.environment)
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=headers) as http:

        def ready() -> bool:
            assert process.poll() is None, process.communicate()[1]
            try:
                return http.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_for(ready, 180, "the service")
            yield http, process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=60)


def events(text: str) -> list[dict[str, Any]]:
    """The data of server-sent events, which end as they should."""
    *found, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(one.removeprefix("data: ")) for one in found]


def measured(http: httpx.Client, name: str, **labels: str) -> float:
    """The sum of a metric's numbers, over all replicas, that have these labels."""
    total = 0.0
    for line in http.get("/metrics").text.splitlines():
        match = re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line)
        if match and labels.items() <= dict(re.findall(r'(\w+)="([^"]*)"', match[1])).items():
            total += float(match[2])
    return total


def replica_names(http: httpx.Client) -> set[str]:
    """Of those that answer."""
    lines = http.get("/metrics").text.splitlines()
    return {line.split('replica="')[1].split('"')[0] for line in lines if line.startswith("vae_dist_slots{")}


def load(server: httpx.Client, clients: int, seconds: float, **body: object) -> list[tuple[float, int | None, float]]:
    """Start, status (None: the connection broke) and duration of what so many clients asked, each one at a time."""
    found: list[tuple[float, int | None, float]] = []

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        until = time.monotonic() + seconds
        while (began := time.monotonic()) < until:
            status: int | None = None
            try:
                answer = await http.post("/v1/sample", json={"seed": number, **body})
                status = answer.status_code
            except httpx.TransportError:
                await asyncio.sleep(0.05)
            found.append((began, status, time.monotonic() - began))
            if status == 429:
                await asyncio.sleep(float(answer.headers["retry-after"]))

    async def together() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=30, limits=limits) as http:
            await asyncio.gather(*(ask(http, number) for number in range(clients)))

    asyncio.run(together())
    return found


def export(path: Path, dataset_dir: Path, seed: int, max_tokens: int = 16, endless: bool = False) -> None:
    """A small model with random weights; an endless one never ends a text by itself."""
    torch.manual_seed(seed)
    tokenizer = Dataset.open(dataset_dir).tokenizer
    part = LstmConfig(hidden_dim=24)
    config = ModelConfig(embedding_dim=16, latent_dim=4, encoder=part, decoder=part)
    vae = TextVAE(config, tokenizer.vocab_size)
    if endless:
        vae.output_bias.data[EOS_ID] = -1e4
    write_model(path, vae.state_dict(), config, tokenizer, max_tokens, {"run": f"seed-{seed}"})
