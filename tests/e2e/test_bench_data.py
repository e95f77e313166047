"""The comparison of data loaders runs, reports what it says it reports, and gives a wrong reader no speed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, SHARED_DATA, Finished, run_command

_MEMBERS = ("ours", "webdataset", "webdataset_members", "webdataset_text", "ray_data")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of this module keep what they make; skips without the corpora."""
    if not (SHARED_DATA / "ptb").is_dir() or not (SHARED_DATA / "multi30k_en").is_dir():
        pytest.skip(f"{SHARED_DATA} lacks multi30k_en or ptb (set VAE_DIST_DATA)")
    return tmp_path_factory.mktemp("bench")


def run(cache: Path, *arguments: str) -> Finished:
    """The command in its quick form."""
    script = str(ROOT / "tests" / "bench" / "data_loaders.py")
    places = ["--data", str(SHARED_DATA), "--cache", str(cache)]
    return run_command([sys.executable, script, "--quick", *places, *arguments], timeout=280)


@pytest.mark.long
def test_it_reports_every_loader(cache: Path) -> None:
    done = run(cache, "--turns", "2", "--only", *_MEMBERS)
    assert done.status == 0, done.out + done.err
    report: dict[str, Any] = done.json
    assert set(report["peers"]) == set(_MEMBERS[1:])
    assert report["tokens_per_second"] > 0
    assert min(report["peers"].values()) > 0
    assert report["ratio_best_peer"] == pytest.approx(report["tokens_per_second"] / max(report["peers"].values()))
    assert (report["batch_sequences"], report["turns"]) == (512, 2)
    assert all(len(speeds) == 2 for speeds in report["speeds"].values())
    assert report["versions"]["webdataset"]["webdataset"] == "1.0.2"
    assert (report["refused"], report["not_installed"]) == ({}, {})
    # Batches of one length pad little; the bound is what shuffled batches of this corpus exceed several times over.
    assert 0 <= report["padding_fraction"] < 0.2
    assert "millions of real tokens a second" in done.out


@pytest.mark.long
@pytest.mark.parametrize("broken", ["ours", "webdataset_members"])
def test_one_wrong_token_is_refused(cache: Path, broken: str) -> None:
    done = run(cache, "--turns", "1", "--only", "ours", "webdataset_members", "--sabotage", broken)
    assert done.status == 1, done.out + done.err
    report = done.json
    assert list(report["refused"]) == [broken]
    assert "wrong result: a pass holds" in report["refused"][broken]
    assert broken not in report["speeds"]
    assert report["ratio_best_peer"] is None
    assert (report["tokens_per_second"] is None) == (broken == "ours")


@pytest.mark.long
def test_a_peer_that_is_not_installed_is_named(cache: Path) -> None:
    done = run(cache, "--turns", "1", "--only", "ours", "mosaic")
    assert done.status == 0, done.out + done.err
    assert "make bench-peers" in done.json["not_installed"]["mosaic"]
    assert done.json["peers"] == {}
    assert "not installed" in done.out
