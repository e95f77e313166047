"""Attention of short sequences on the CPU in half precision, against float64."""

from __future__ import annotations

import pytest
import torch

from vae_dist.model.transformer import attention

SHAPE = (3, 2, 7, 16)


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [v.to(torch.bfloat16).to(dtype).requires_grad_() for v in values]


def weights() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    score = torch.einsum("bnqd,bnkd->bnqk", q, k) / SHAPE[-1] ** 0.5
    odds = torch.where(allowed, score.exp(), 0.0)
    return torch.einsum("bnqk,bnkd->bnqd", odds / odds.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("kind", ["causal", "padding", "whole"])
def test_half_precision_attention_and_its_gradients_are_those_of_float64_up_to_rounding(kind: str) -> None:
    length_B = torch.tensor([7, 4, 1])
    padding = (torch.arange(SHAPE[2]) < length_B[:, None])[:, None, None, :]
    causal = torch.ones(SHAPE[2], SHAPE[2], dtype=torch.bool).tril()
    allowed = {"causal": causal, "padding": padding, "whole": torch.tensor(True)}[kind]
    mask = padding if kind == "padding" else None
    wide = inputs(torch.float64)
    expected = by_hand(*wide, allowed)
    expected_gradients = torch.autograd.grad((expected * weights()).sum(), wide)
    half = inputs(torch.bfloat16)
    found = attention(*half, mask, kind == "causal", 0.0)
    gradients = torch.autograd.grad((found.double() * weights()).sum(), half)
    assert found.dtype == torch.bfloat16
    for ours, exact in zip([found.detach(), *gradients], [expected.detach(), *expected_gradients], strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < 8e-3


def test_attention_in_half_precision_drops_what_it_attends_to_and_keeps_its_mean() -> None:
    torch.manual_seed(0)
    q, k, v = (t.detach() for t in inputs(torch.bfloat16))
    ones = torch.ones_like(v)
    drawn = torch.stack([attention(q, k, ones, None, True, 0.5).double() for _ in range(400)])
    # The first query attends to one position alone: what it gets is 0 or 2.
    assert set(drawn[:, :, :, 0].unique().tolist()) == {0.0, 2.0}
    assert float((drawn.mean(0) - 1.0).abs().max()) < 0.25
