"""More replicas while there is more to do than one is meant for, fewer when there is not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from service import export, load, replica_names, serving
from support import ray_head, wait_for


@pytest.mark.long
@pytest.mark.timeout(300)
def test_replicas_come_and_go_with_the_requests_and_none_is_lost(
    dataset_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    export(tmp_path / "endless", dataset_dir, 2, 100_000, endless=True)
    (tmp_path / "serve.yaml").write_text(
        f"models: {{endless: {tmp_path}/endless}}\nmin_replicas: 1\nmax_replicas: 2\ntarget_requests: 2\n"
        "upscale_delay_s: 1\ndownscale_delay_s: 3\nthreads: 1\nslots: 8\n"
    )
    asked: list[tuple[float, int | None, float]] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            asked.extend(load(http, 8, 2.0, max_tokens=400))

    with (
        ray_head(tmp_path_factory.mktemp("home")) as cluster,
        serving(cluster, "--config", str(tmp_path / "serve.yaml")) as (http, _),
    ):
        assert len(replica_names(http)) == 1
        with ThreadPoolExecutor() as executor:
            busy = executor.submit(ask)
            try:
                wait_for(lambda: len(replica_names(http)) == 2, 120, "a second replica")
            finally:
                enough.set()
            busy.result()
        wait_for(lambda: len(replica_names(http)) == 1, 60, "its end")
        asked += load(http, 2, 1.0, max_tokens=10)
    assert {status for _, status, _ in asked} == {200}
