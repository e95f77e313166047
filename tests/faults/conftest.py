"""What the tests of faults share: a cluster, and a run to which nothing happens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.runs import Run, StartRun
from support import RayCluster


@pytest.fixture(scope="package")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="package")
def start_run(
    ray_cluster: RayCluster, storage: Path, dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartRun]:
    """Start a run by name; what is still going at the end is killed."""
    logs = tmp_path_factory.mktemp("logs")
    runs: list[Run] = []

    def start(name: str, *settings: str, storage: Path = storage) -> Run:
        runs.append(Run(ray_cluster, storage, logs / f"{name}.err", name, f"data.dir={dataset_dir}", *settings))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


@pytest.fixture(scope="package")
def undisturbed(start_run: StartRun) -> Run:
    """Two workers, from start to end."""
    run = start_run("undisturbed")
    run.finish()
    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The times that were measured, as `make faults` is asked for them."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties if report.when == "call" else ():
            if name.endswith("_seconds"):
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {name} {value:.1f}")
