"""Segment sums, and which backend is chosen."""

import logging

import pytest
import torch

from vae_kernels import reference, resolve_backend, segment_sum
from vae_kernels.segment_sum import _spread, _sum

OFFSETS = torch.tensor([0, 3, 3, 4, 11])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_value_and_gradient(dtype):
    x_N = torch.randn(11, dtype=torch.float64, requires_grad=True)
    upstream_B = torch.tensor([1.5, 7.0, -2.0, 0.0], dtype=torch.float64)
    y_B = segment_sum(x_N, OFFSETS.to(dtype))
    torch.testing.assert_close(y_B, reference.segment_sum(x_N, OFFSETS))
    (grad_N,) = torch.autograd.grad(y_B, x_N, upstream_B)
    assert grad_N.tolist() == [1.5] * 3 + [-2.0] + [0.0] * 7


def test_gradcheck_and_strided_input():
    x_N = torch.randn(22, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segment_sum(x[::2], OFFSETS), (x_N,))
    assert torch.autograd.gradgradcheck(
        lambda x: segment_sum(x, OFFSETS).square(), (x_N[:11].detach().requires_grad_(),)
    )


def test_a_sequence_sums_the_same_in_any_company():
    x_N = torch.randn(1000)
    offsets = torch.tensor([0, 17, 490, 1000])
    whole_B = segment_sum(x_N, offsets)
    for index, (a, b) in enumerate([(0, 17), (17, 490), (490, 1000)]):
        assert segment_sum(x_N[a:b], torch.tensor([0, b - a]))[0] == whole_B[index]


def test_no_sequences():
    assert segment_sum(torch.zeros(0), torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_wide_and_rounded_once(dtype):
    x_N = (torch.rand(3000) + 0.5).to(dtype).requires_grad_()
    offsets = torch.tensor([0, 1000, 1000, 2990, 3000])
    y_B = segment_sum(x_N, offsets)
    wanted_B = reference.segment_sum(x_N.double(), offsets)
    assert y_B.dtype == dtype
    assert ((y_B.double() - wanted_B).abs() <= 0.51 * torch.finfo(dtype).eps * wanted_B).all()
    (grad_N,) = torch.autograd.grad(y_B, x_N, torch.tensor([0.5, 9.0, -3.0, 0.0], dtype=dtype))
    assert torch.equal(grad_N, torch.tensor([0.5, -3.0, 0.0]).repeat_interleave(offsets.diff()[[0, 2, 3]]).to(dtype))


def test_strided_offsets_and_expanded_gradients():
    x_N = torch.randn(11, dtype=torch.float64, requires_grad=True)
    strided = torch.stack((OFFSETS, OFFSETS), 1)[:, 0]
    y_B = segment_sum(x_N, strided)
    assert torch.equal(y_B, segment_sum(x_N, OFFSETS))
    (grad_N,) = torch.autograd.grad(y_B.sum(), x_N)
    assert (grad_N == 1).all()


def test_nothing_uninitialised_is_read_or_left():
    assert torch.utils.deterministic.fill_uninitialized_memory
    x_N = torch.randn(11, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        y_B = segment_sum(x_N, OFFSETS)
        (grad_N,) = torch.autograd.grad(y_B.sum(), x_N)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(y_B).all() and y_B[1] == 0 and (grad_N == 1).all()


def test_registration():
    x_N, y_B = torch.randn(11, requires_grad=True), torch.randn(4, requires_grad=True)
    torch.library.opcheck(_sum, (x_N, OFFSETS, "auto"))
    torch.library.opcheck(_spread, (y_B, OFFSETS.int(), 11, "auto"))


def test_compiled_whole():
    x_N = torch.randn(11, requires_grad=True)

    def run(x_N, offsets_B1):
        return segment_sum(x_N, offsets_B1).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_N, OFFSETS), run(x_N, OFFSETS))
    assert torch.equal(*(torch.autograd.grad(y(x_N, OFFSETS), x_N)[0] for y in (compiled, run)))
    # The offsets' values are looked at when the graph runs.
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
        compiled(x_N, OFFSETS.flip(0))


def test_only_floating_point_vectors():
    for x in (torch.zeros(11, dtype=torch.int64), torch.zeros(11, 2)):
        with pytest.raises(TypeError, match=r"x must be floating point \[N\]"):
            segment_sum(x, OFFSETS)


@pytest.mark.parametrize("offsets", [[0, 3], [1, 11], [0, 6, 4, 11], []])
def test_offsets_that_do_not_fit_are_refused(offsets):
    with pytest.raises(ValueError, match="cu_seqlens"):
        segment_sum(torch.zeros(11), torch.tensor(offsets, dtype=torch.int64))


def test_backend_choice_and_its_log(caplog, monkeypatch):
    from vae_kernels import backend

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="vae_kernels"):
        assert resolve_backend("auto", torch.zeros(1)) == "torch"
        assert resolve_backend("auto", torch.zeros(1)) == "torch"
    assert [record.getMessage() for record in caplog.records] == ["backend torch (automatic: tensors on cpu)"]
    with pytest.raises(ValueError, match="auto, triton, torch"):
        resolve_backend("cuda", torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1|not installed"):
        resolve_backend("triton", torch.zeros(1))
