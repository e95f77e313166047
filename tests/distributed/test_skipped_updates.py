"""Updates that are left out, on two ranks at every ZeRO stage: all that they would have changed stays bit for bit."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, free_port, rank_environment, run_command
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vae_dist.engine.skip import SkipRule


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [(0, "adamw"), *(pytest.param(*case, marks=pytest.mark.long) for case in [(0, "sgd"), (1, "adamw"), (3, "adamw")])],
)
def test_a_bad_gradient_of_one_rank_changes_nothing(dataset_dir: Path, stage: int, optimizer: str) -> None:
    """Protected by `optimizer.found_inf` in `SkipRule._before_update` (engine/skip.py)."""
    port = free_port()

    def rank(number: int) -> Any:
        environment = rank_environment(number, 2, port)
        environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
        worker = str(ROOT / "tests/distributed/skip_worker.py")
        done = run_command([sys.executable, worker, str(dataset_dir), str(stage), optimizer], environment, 200)
        assert done.status == 0, done.err
        return json.loads(done.out.splitlines()[-1]) if number == 0 else None

    with ThreadPoolExecutor(2) as pool:
        found, _ = pool.map(rank, range(2))
    assert found["skipped"] == 3 and found["finite"]
    not_a_number, infinite, spike, large = found["bad"]
    for one in (not_a_number, infinite, spike):
        assert one["same"] and one["sequences"] == 0 and one["rec"] == 0, one
    # Three times the usual gradient is no spike.
    assert not large["same"] and large["sequences"] > 0


class Engine:
    """What the rule needs of DeepSpeed's engine: a module, an optimizer, a step."""

    def __init__(self) -> None:
        self.module = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1, fused=True)
        for parameter in self.module.parameters():
            parameter.grad = torch.ones_like(parameter)

    def zero_optimization_stage(self) -> int:
        return 0

    def step(self) -> None:
        self.optimizer.step()


def verdicts(rule: SkipRule, norms: list[float]) -> list[bool]:
    return [bool(rule.step(torch.tensor(norm))) for norm in norms]


def test_a_spike_is_judged_by_the_median_of_the_updates_that_were_made() -> None:
    rule = SkipRule(Engine(), 10.0)
    # Before 128 updates nothing finite is a spike.
    assert not any(verdicts(rule, [1e9, *[1.0] * 63, *[2.0] * 64]))
    # The median of 64 ones and 63 twos and a huge one is 2 (or the lower middle, 1, as the huge one leaves).
    assert verdicts(rule, [19.0, 21.0, float("nan"), 1e9]) == [False, True, True, True]
    # Spikes do not enter the median: however many there are, they stay spikes.
    assert all(verdicts(rule, [50.0] * 200))
    assert rule.skipped == 203
    rule.restart()
    assert verdicts(rule, [50.0, 500.0]) == [False, False]


def test_no_step_waits_for_the_host() -> None:
    """Tensors without data refuse whatever would have to look at a number."""
    with FakeTensorMode():
        rule = SkipRule(Engine(), 4.0)
        rule._judge(torch.ones(()))
        with pytest.raises(DataDependentOutputException):
            int(rule._skipped)


def test_the_state_goes_on_where_it_was() -> None:
    rule, resumed = SkipRule(Engine(), 4.0), SkipRule(Engine(), 4.0)
    verdicts(rule, [1.0 + 0.001 * i for i in range(130)])
    resumed.load(json.loads(json.dumps(rule.state())))
    following = [4.1, 4.3, 5.0, 1.0, 4.2]
    assert verdicts(rule, following) == verdicts(resumed, following)
    assert SkipRule(Engine(), None).state() == {}
