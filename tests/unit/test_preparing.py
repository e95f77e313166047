"""What a prepare shows while it runs: share, rows a second, time left."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from support import corpus

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.observe import preparing
from vae_dist.observe.preparing import Bar, Lines, Rate, show_preparing


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(preparing.time, "monotonic", lambda: self.now)


def test_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rate = Rate("encode", 1000, 200)
    assert str(rate) == "encode        20 %"
    clock.now += 10
    rate.advance(100, 5000)
    # 100 in ten seconds, 700 are left; what was done before says nothing about the speed.
    assert str(rate) == "encode        30 %  500 rows/s  left 1m 10s"


def test_lines_come_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock, lines = Clock(monkeypatch), Lines()
    with caplog.at_level(logging.INFO):
        lines.begin("encode", 100, 0)
        for _ in range(50):
            clock.now += 1
            lines.advance(2, 10)
        lines.end()
    assert len(caplog.messages) == 5
    assert caplog.messages[0] == "encode        20 %  10 rows/s  left 40s"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    bar = show_preparing()
    assert isinstance(bar, Bar)
    bar.begin("encode", 100, 50)
    bar.advance(50, 7)
    bar.end()
    assert "encode" in screen.getvalue()
    assert "100 %" in screen.getvalue()
    assert "rows/s" in screen.getvalue()


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(show_preparing(), Lines)


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def begin(self, stage: str, total: int, done: int) -> None:
        self.told.append((stage, total, done))

    def advance(self, done: int, texts: int) -> None:
        self.told.append((done, texts))

    def end(self) -> None:
        self.told.append(())


def test_what_prepare_tells(tmp_path: Path) -> None:
    """Every stage begins, advances to its total and ends; texts are counted."""
    (tmp_path / "a.txt").write_text("\n".join(corpus()) + "\n", encoding="utf-8")
    recorder = Recorder()
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", PrepareConfig(), progress=recorder, group_bytes=50_000)
    size = (tmp_path / "a.txt").stat().st_size
    stages: dict[str, tuple[int, int]] = {}
    begun = ""
    for entry in recorder.told:
        if len(entry) == 3:
            begun, total, done = entry
            assert done == 0
            assert total == (4500 if begun == "shards" else size)
            stages[begun] = (0, 0)
        elif entry:
            stages[begun] = (stages[begun][0] + entry[0], stages[begun][1] + entry[1])
    assert stages == {"sample": (size, 4500), "encode": (size, 4500), "shards": (4500, 4500)}
    assert recorder.told.count(()) == 3
