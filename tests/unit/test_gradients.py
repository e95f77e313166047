"""Clipping inside the fused update: as torch's clipping before it."""

from __future__ import annotations

import pytest
import torch

from vae_dist.engine.gradients import clip_in_update, gradient_norm


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_clipping_in_the_update_is_torchs(kind: type[torch.optim.Optimizer], max_norm: float) -> None:
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (7, 33)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        other.data.copy_(mine.data)
    fused, plain = kind(ours, lr=0.1, fused=True), kind(theirs, lr=0.1, foreach=False)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        norm = gradient_norm(ours)
        assert norm.item() == pytest.approx(sum(float(p.grad.square().sum()) for p in theirs) ** 0.5, rel=1e-12)
        clip_in_update(fused, norm, max_norm)
        if max_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        fused.step()
        plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
