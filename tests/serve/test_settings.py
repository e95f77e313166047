"""serve.yaml, flags, and names of models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vae_dist.config.load import load_section
from vae_dist.errors import ConfigError
from vae_dist.serve.settings import ServeConfig, ServiceConfig, named_models


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("models: {a: x, b: y}\ntexts: [data]\nport: 8001\nslots: 8\nrequest_timeout_s: 5\n")
    config = load_section(ServeConfig, path, {"port": 9000})
    assert (config.port, config.slots, config.request_timeout_s, list(config.models)) == (9000, 8, 5.0, ["a", "b"])
    assert config.texts == ["data"]
    assert load_section(ServeConfig, path, {"models": {"c": "z"}}).models == {"c": "z"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("models: {a: x}\nslot: 8\n", "serve.yaml:2: unknown key 'slot'. Did you mean 'slots'?"),
        ("models: {}\n", "models"),
        ("port: 8000\n", "models"),
        ("models: {a: x}\nqueue: -1\n", "serve.yaml:2: queue = -1"),
        ("models: {a: x}\nmin_replicas: 3\nmax_replicas: 2\n", "max_replicas = 2 is below min_replicas = 3"),
        ("models: {a: x}\nrequest_timeout_s: .inf\n", "request_timeout_s"),
    ],
)
def test_mistakes_in_the_file_are_told_with_their_line(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_section(ServeConfig, tmp_path / "serve.yaml", {})
    assert named in str(refused.value)


def test_ray_builds_the_application_of_its_args(model_dir: Path) -> None:
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as ray_builds

    from vae_dist.serve.app import build

    assert isinstance(ray_builds(build, {"models": {"a": str(model_dir)}, "slots": 8}), Application)
    with pytest.raises(ConfigError, match="port"):  # an address is not the application's
        ray_builds(build, {"models": {"a": str(model_dir)}, "port": 8000})


def test_a_directory_without_a_name_has_that_of_its_run(model_dir: Path) -> None:
    assert named_models([str(model_dir), f"mine={model_dir}"]) == {
        "seed-5": str(model_dir),
        "mine": str(model_dir),
    }
    with pytest.raises(ConfigError, match="Two models are called mine"):
        named_models([f"mine={model_dir}", "mine=elsewhere"])


def test_no_queue_is_left_without_a_bound() -> None:
    from vae_dist.serve.app import _options

    options: dict[str, Any] = _options(ServiceConfig(models={"a": "x"}, slots=4, queue=6, request_timeout_s=7.0))
    assert options["max_ongoing_requests"] == options["max_queued_requests"] == 10
    assert options["graceful_shutdown_timeout_s"] > 7.0
    scaled = _options(ServiceConfig(models={"a": "x"}, min_replicas=1, max_replicas=3, target_requests=5))
    assert scaled["autoscaling_config"] == {
        "target_ongoing_requests": 5,
        "min_replicas": 1,
        "max_replicas": 3,
        "upscale_delay_s": 30.0,
        "downscale_delay_s": 600.0,
    }


def test_replicas_get_the_environment_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve gives them nothing of it but the folder where they name an environment of their own."""
    from vae_dist.serve.app import _options, ray

    job = {"working_dir": "gcs://x.zip", "pip": ["s3fs"], "env_vars": {"AWS_PROFILE": "ours"}}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=job))
    found = _options(ServiceConfig(models={"a": "x"}))["ray_actor_options"]["runtime_env"]
    assert found.pop("env_vars").items() > job.pop("env_vars").items()  # type: ignore[attr-defined]
    assert found == job
