"""Start the service on a local or running Ray cluster and stay until interrupted."""

from __future__ import annotations

import os
import socket
import threading

import ray
from ray import serve

from vae_dist.errors import ConfigError, MachineError
from vae_dist.export.model_dir import load_model
from vae_dist.launch.access import is_loopback
from vae_dist.launch.cluster import connect
from vae_dist.launch.stop import signals_to
from vae_dist.observe.console import say
from vae_dist.serve.app import application
from vae_dist.serve.guard import KEYS_VARIABLE
from vae_dist.serve.latent_map import validation_texts
from vae_dist.serve.settings import ServeConfig

_NAME = "vae_dist"


def serve_models(config: ServeConfig) -> None:
    """Serve models over HTTP; returns after SIGINT or SIGTERM, when the requests under way have ended.

    Raises:
        ConfigError: an address beyond loopback without keys, or keys that cannot be used.
        ModelError: a directory is no model; found before anything is started.
        DataError: one of the texts is no data set with a validation split.
        MachineError: the address cannot be bound.
    """
    has_keys = bool(config.keys or os.environ.get(KEYS_VARIABLE))
    if not has_keys and not is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} is reached from other machines, and there are no keys: give --keys FILE, with "
            "NAME:KEY on each line, or serve on 127.0.0.1."
        )
    for path in config.models.values():
        load_model(path)  # a damaged model is told here and not by a replica
    validation_texts(config.texts)
    _check_free(config.host, config.port)
    application(config)  # so are keys that cannot be used
    done = threading.Event()
    # Before the signals: Ray takes SIGTERM for itself when it connects.
    connect()
    with signals_to(done.set):
        serve.start(http_options={"host": config.host, "port": config.port})
        # Built again: now that there is a job, replicas get its environment.
        serve.run(application(config), name=_NAME, route_prefix="/")
        _greet(config, has_keys)
        while not done.wait(0.5):
            pass
    say("stopping")
    _stop(config.request_timeout_s)
    ray.shutdown()


def _greet(config: ServeConfig, has_keys: bool) -> None:
    address = f"http://{config.host}:{config.port}"
    for name, path in config.models.items():
        say(f"serving {name} ({path}) on {address}")
    key = "-H 'authorization: Bearer KEY' " if has_keys else ""
    body = f"""{key}-H 'content-type: application/json' -d '{{"n": 3, "seed": 0}}'"""
    say(f"try: curl -s {address}/v1/sample {body}")


def _stop(patience_s: float) -> None:
    """Let replicas refuse what comes and finish what they have, then end them: without them the answer would be 404."""
    handle = serve.get_app_handle(_NAME)
    try:
        handle.broadcast("drain").results(timeout_s=patience_s, return_exceptions=True)
    except Exception as error:  # whatever they say, they are ended
        say(f"not all replicas finished: {type(error).__name__}: {error}")
    # On a cluster that was there before, other applications stay.
    serve.delete(_NAME)


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise MachineError(
                f"Cannot listen on {host}:{port}: {error}. Choose another --port, or stop what uses it."
            ) from None
