"""Dropout of recurrent weights and of features, against masks drawn by hand and torch's own.

Shapes: B sequences, T positions, E embedding, H hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vae_dist.config.model_schema import LstmConfig, ModelConfig
from vae_dist.model.dropout import SequenceDropout
from vae_dist.model.lstm import Lstm

E = 6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def make_lstm(p: float, layers: int = 2) -> Lstm:
    part = LstmConfig(hidden_dim=5, num_layers=layers, recurrent_dropout=p)
    torch.manual_seed(1)
    return Lstm(E, part, ModelConfig()).double().eval()


def explicit_lstm(lstm: nn.LSTM, masks: list[torch.Tensor], x_BTE: torch.Tensor) -> torch.Tensor:
    """Gate by gate, from zero, with one masked recurrent matrix a layer for all steps and sequences."""
    for (w_ih, w_hh, b_ih, b_hh), mask in zip(lstm.all_weights, masks, strict=True):
        h = c = x_BTE.new_zeros(x_BTE.shape[0], lstm.hidden_size)
        states = []
        for x_BE in x_BTE.unbind(1):
            i, f, g, o = (x_BE @ w_ih.T + b_ih + h @ (w_hh * mask).T + b_hh).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        x_BTE = torch.stack(states, 1)
    return x_BTE


def test_recurrent_dropout_has_one_mask_a_pass_for_all_steps_and_sequences() -> None:
    lstm, x_BTE = make_lstm(0.4).train(), random(3, 6, E)
    torch.manual_seed(5)
    actual = lstm(x_BTE)[0]
    torch.manual_seed(5)
    masks = [F.dropout(torch.ones(20, 5, dtype=torch.float64), 0.4) for _ in range(2)]
    assert 0 < sum(int((mask == 0).sum()) for mask in masks) < 200
    expected = explicit_lstm(lstm, masks, x_BTE)
    equal(actual, expected)
    upstream = random(*actual.shape, seed=9)
    weights = list(lstm.parameters())
    gradients = (torch.autograd.grad(y, weights, upstream) for y in (actual, expected))
    for gradient, explicit in zip(*gradients, strict=True):
        equal(gradient, explicit)
    assert not torch.equal(lstm(x_BTE)[0], actual)


@torch.no_grad()
def test_recurrent_dropout_keeps_the_mean_and_is_off_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    lstm, plain, x_BTE = make_lstm(0.4, layers=1), make_lstm(0.0, layers=1), random(3, 6, E)
    assert torch.equal(lstm(x_BTE)[0], plain(x_BTE)[0])
    used: list[torch.Tensor] = []
    fused = torch.lstm

    def spy(x: torch.Tensor, state: Any, weights: list[torch.Tensor], *rest: Any) -> Any:
        used.append(weights[1])
        return fused(x, state, weights, *rest)

    monkeypatch.setattr(torch, "lstm", spy)
    lstm.train()
    for _ in range(2000):
        lstm(x_BTE[:1, :1])
    ratio = torch.stack(used) / lstm.weight_hh_l0
    # Five standard errors of a mean of 2,000 with variance 0.4 / 0.6.
    assert (ratio.mean(0) - 1).abs().max() < 5 * (0.4 / 0.6 / 2000) ** 0.5


def test_recurrent_dropout_runs_in_bfloat16_over_float32_weights() -> None:
    lstm, x_BTE = make_lstm(0.4).float().train(), random(3, 6, E).float()
    found = []
    for autocast in (False, True):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_BTH = lstm(x_BTE)[0]
        found.append(
            (y_BTH.float().detach(), *torch.autograd.grad(y_BTH.float().square().sum(), list(lstm.parameters())))
        )
    for wide, narrow in zip(*found, strict=True):
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, wide, atol=0.05 * wide.abs().max().item(), rtol=0.0)


def test_shared_dropout_has_one_mask_for_all_positions_of_a_sequence() -> None:
    torch.manual_seed(0)
    x_BTH = random(40, 6, 50).requires_grad_()
    y_BTH = SequenceDropout(0.3, shared=True)(x_BTH)
    mask_BTH = (y_BTH / x_BTH).detach()
    assert set(mask_BTH.round(decimals=12).unique().tolist()) == {0.0, round(1 / 0.7, 12)}
    equal(mask_BTH, mask_BTH[:, :1].expand_as(mask_BTH))
    dropped_BH = mask_BTH[:, 0] == 0
    assert abs(float(dropped_BH.double().mean()) - 0.3) < 5 * (0.21 / dropped_BH.numel()) ** 0.5
    assert len(dropped_BH.unique(dim=0)) == 40
    (gradient,) = torch.autograd.grad(y_BTH.sum(), x_BTH)
    equal(gradient, mask_BTH)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_that_is_not_shared_is_torchs_own(p: float) -> None:
    x_BTH, ours, torchs = random(3, 5, 7), SequenceDropout(p, shared=False), nn.Dropout(p)
    for training in (True, False):
        found = []
        for module in (ours.train(training), torchs.train(training)):
            torch.manual_seed(2)
            found.append((module(x_BTH), torch.rand(1)))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(SequenceDropout(0.3, shared=True).eval()(x_BTH), x_BTH)
    assert torch.equal(SequenceDropout(0.0, shared=True)(x_BTH), x_BTH)
