"""The Ray Serve application: replicas that each have all models, behind one address.

All models of a service are in every replica. Text VAEs are small, so that memory is not what decides; any replica can
answer any request, so that Serve balances and scales by requests alone, and one address has no second hop. (Models
that do not fit together are services of their own. `serve.multiplexed`, which loads models when they are asked for,
chooses replicas by a header, and would let a request wait for a model to load.)
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from prometheus_client import Metric
from ray import serve
from ray.serve import Application

from vae_dist.config.load import validate_section
from vae_dist.export.model_dir import find_model_dir
from vae_dist.serve.api import build_api
from vae_dist.serve.gate import Gate
from vae_dist.serve.guard import Access, Guard, read_access
from vae_dist.serve.measures import Measures, exposition
from vae_dist.serve.models import Models
from vae_dist.serve.settings import ServiceConfig

# What a replica has to end in, beyond the longest request.
_MARGIN_S = 5.0
_PATIENCE_S = 5.0


@serve.deployment
@serve.ingress()
class TextVaeService:
    """One replica: its models, each on a thread beside the event loop, whose engine all requests share."""

    def __init__(self, config: ServiceConfig, access: Access) -> None:
        torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // config.max_replicas))
        self._models = Models(config)
        self._measures = Measures(self._models)
        api = build_api()
        api.router.lifespan_context = self._until_the_end
        endpoints = [str(path) for path in api.openapi()["paths"]]
        self._gate = Gate(Guard(api, access), config.request_timeout_s, endpoints, self._measures)
        api.state.models, api.state.gate, api.state.exposition = self._models, self._gate, self._exposition

    def __serve_build_asgi_app__(self) -> Gate:
        return self._gate

    async def drain(self) -> None:
        """Take no more requests; returns when those under way have ended."""
        await self._gate.drain()

    async def measures(self) -> tuple[str, list[Metric]]:
        """The name of this replica, and its numbers."""
        return serve.get_replica_context().replica_id.unique_id, self._measures.families()

    async def _exposition(self) -> bytes:
        """The numbers of all replicas; where one does not answer in time, of this one."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            found = await handle.broadcast("measures").results_async(timeout_s=_PATIENCE_S, return_exceptions=True)
        except Exception:  # one hangs or has just died: Prometheus asks again soon
            found = [await self.measures()]
        return exposition([one for one in found if not isinstance(one, BaseException)])

    @asynccontextmanager
    async def _until_the_end(self, api: FastAPI) -> AsyncIterator[None]:
        yield
        # Serve gets here when it ends a replica, after the last of its requests.
        self._models.stop()


def build(args: dict[str, Any]) -> Application:
    """The application for `import_path: vae_dist.serve.app:build`; `args` are those of `ServiceConfig`.

    Ray would validate them itself, but not where annotations are text, as they are here.
    """
    return application(validate_section(ServiceConfig, args))


def application(config: ServiceConfig) -> Application:
    """The application of a configuration.

    Raises:
        ModelError: a directory is no model.
        ConfigError: the keys cannot be used.
    """
    access = read_access(Path(config.keys) if config.keys else None, config.requests_per_minute)
    # A replica runs in another folder. A link stays one: it may come to mean another export.
    models = {name: str(find_model_dir(Path(path)).absolute()) for name, path in config.models.items()}
    texts = [text if "://" in text else str(Path(text).expanduser().absolute()) for text in config.texts]
    deployment: Any = TextVaeService
    found: Application = deployment.options(**_options(config)).bind(
        config.model_copy(update={"models": models, "texts": texts}), access
    )
    return found


def _options(config: ServiceConfig) -> dict[str, Any]:
    replicas: dict[str, Any] = {"num_replicas": config.min_replicas}
    if config.max_replicas > config.min_replicas:
        scaling = {
            "target_ongoing_requests": config.target_requests,
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
        }
        replicas = {"autoscaling_config": scaling}
    return {
        **replicas,
        # The engine has the queue, and refuses what does not fit; what waits before it, waits for a replica.
        "max_ongoing_requests": config.slots + config.queue,
        "max_queued_requests": config.slots + config.queue,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "graceful_shutdown_timeout_s": config.request_timeout_s + _MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {
            "num_cpus": config.threads or 1,
            "num_gpus": config.gpus,
            "runtime_env": _runtime_env(),
        },
    }


def _runtime_env() -> dict[str, Any]:
    """The job's, which Serve itself gives only to replicas that ask for nothing of their own."""
    job = ray.get_runtime_context().runtime_env if ray.is_initialized() else {}
    # The model has a thread of its own: another one between it and Ray's only makes first tokens wait.
    return {**job, "env_vars": {**job.get("env_vars", {}), "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}}
