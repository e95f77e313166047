"""Start the service on a local or running Ray cluster and stay until interrupted."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import ray
from ray import serve

from vae_dist.errors import MachineError
from vae_dist.export.model_dir import find_model_dir, load_model
from vae_dist.launch.cluster import connect
from vae_dist.launch.stop import signals_to
from vae_dist.observe.console import say
from vae_dist.serve.app import TextVaeService

_NAME = "vae_dist"


def serve_model(model: Path, host: str, port: int) -> None:
    """Serve a model directory over HTTP; returns after SIGINT or SIGTERM.

    Raises:
        ModelError: `model` is no model directory; found before anything is started.
        MachineError: the address cannot be bound.
    """
    path = find_model_dir(model).resolve()
    load_model(path)  # a damaged model is told here and not by a replica
    _check_free(host, port)
    done = threading.Event()
    with signals_to(done.set):
        connect()
        serve.start(http_options={"host": host, "port": port})
        threads = len(os.sched_getaffinity(0))
        application = TextVaeService.bind(str(path), threads)  # type: ignore[attr-defined]
        serve.run(application, name=_NAME, route_prefix="/")
        say(f"serving {path} on http://{host}:{port}")
        body = """-H 'content-type: application/json' -d '{"n": 3, "seed": 0}'"""
        say(f"try: curl -s http://{host}:{port}/v1/sample {body}")
        while not done.wait(0.5):
            pass
    say("stopping")
    # On a cluster that was there before, other applications stay.
    serve.delete(_NAME)
    ray.shutdown()


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise MachineError(
                f"Cannot listen on {host}:{port}: {error}. Choose another --port, or stop what uses it."
            ) from None
