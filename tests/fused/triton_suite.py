"""The Triton kernels against float64: on the GPU where there is one, else in Triton's interpreter.

`test_triton.py` runs this file in a process of its own, because the interpreter must be chosen before Triton is
imported. By hand: TRITON_INTERPRET=1 pytest tests/fused/triton_suite.py
"""

import pytest
import torch
import triton
import triton.language as tl
from test_gaussian_rsample_kl import OUTPUTS, RNG, make_inputs, run, run_reference, scalarise
from test_linear_cross_entropy import OFFSETS, OPTIONS, assert_close, grads, make, upstream

from vae_kernels import (
    gaussian_rsample_kl,
    linear_cross_entropy,
    linear_cross_entropy_triton,
    philox_normal,
    reference,
)
from vae_kernels.philox import normal_words, unit_interval, unit_interval_without_zero
from vae_kernels.philox_triton import normal_pair, philox_uniform_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"M": 16, "W": 32, "D": 16, "num_warps": 4, "num_stages": 2}


@pytest.fixture(params=[True, False], ids=["descriptors", "pointers"])
def small_tiles(request, monkeypatch):
    """Several ragged tiles, splits and vocabulary slices at a size the interpreter can afford."""
    monkeypatch.setattr(linear_cross_entropy_triton, "has_tma", lambda device: request.param)
    for name in ("SMALL_TILE", "LARGE_TILE", "CAPPED_TILE", "AMPERE_TILE", "SINGLE_TILE"):
        monkeypatch.setattr(linear_cross_entropy_triton, name, SMALL)
    monkeypatch.setattr(linear_cross_entropy_triton, "WORKSPACE_BYTES", 9 * 143 * 4)
    monkeypatch.setattr(linear_cross_entropy_triton, "PROGRAMS_WANTED", 4)


def on_device(tensors, dtype):
    """Leaf copies on the device; floating ones in `dtype`."""
    return [
        None
        if t is None
        else t.detach().to(DEVICE, dtype).requires_grad_()
        if t.is_floating_point()
        else t.detach().to(DEVICE)
        for t in tensors
    ]


@triton.jit
def noise_kernel(rng, sample_id, radius, angle, even, odd, R: tl.constexpr, P: tl.constexpr, TAG: tl.constexpr):
    row = tl.arange(0, R)
    pair = tl.arange(0, P)
    tag = tl.full((1, P), TAG, tl.uint32)
    u, v = philox_uniform_pair(rng, tl.load(sample_id + row)[:, None], pair[None, :], tag)
    a, b = normal_pair(u, v)
    at = row[:, None] * P + pair[None, :]
    tl.store(radius + at, u)
    tl.store(angle + at, v)
    tl.store(even + at, a)
    tl.store(odd + at, b)


@pytest.mark.parametrize("rng", [[1234, 7], [-5, 2**31 + 3], [2**40 + 1, 2**33]])
def test_uniforms_bit_for_bit_and_normals(rng):
    rng = torch.tensor(rng)
    ids = torch.randint(-(2**62), 2**62, (64,))
    ids[:4] = torch.tensor([0, 1, 2**32, -1])
    outputs = [torch.empty(64, 128, device=DEVICE) for _ in range(4)]
    # Stream 255 sets the counter's top bit.
    noise_kernel[(1,)](rng.to(DEVICE), ids.to(DEVICE), *outputs, R=64, P=128, TAG=(255 << 24) | 0)
    radius, angle, even, odd = (t.cpu() for t in outputs)
    word_0, word_1 = normal_words(rng, ids, 256, num_samples=1, stream=255)
    assert torch.equal(radius, unit_interval_without_zero(word_0)[0])
    assert torch.equal(angle, unit_interval(word_1)[0])
    noise = philox_normal(rng, ids, 256, num_samples=1, stream=255)[0]
    torch.testing.assert_close(torch.stack((even, odd), -1).flatten(-2), noise, rtol=0, atol=1e-6)


def test_equal_keys_in_other_tensors_give_equal_noise():
    ids = torch.arange(64, device=DEVICE)
    first, second = ([torch.empty(64, 128, device=DEVICE) for _ in range(4)] for _ in range(2))
    for outputs in (first, second):
        noise_kernel[(1,)](torch.tensor([3, 4], device=DEVICE), ids, *outputs, R=64, P=128, TAG=1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("prior", ["none", "shared", "rows"])
@pytest.mark.parametrize("rows, dim, num_samples, free_bits", [(6, 5, 3, 0.25), (1, 1, 1, 0.0), (45, 33, 2, 0.0)])
def test_gaussian_values_and_gradients(prior, rows, dim, num_samples, free_bits):
    inputs = on_device(make_inputs(prior, rows=rows, dim=dim), torch.float32)
    wide = [None if t is None else t.detach().cpu() for t in inputs]
    wide = [t.double().requires_grad_() if t is not None and t.is_floating_point() else t for t in wide]
    ours = run_on_device(inputs, num_samples=num_samples, free_bits=free_bits)
    expected = run_reference(wide, free_bits, num_samples)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad(scalarise(ours, OUTPUTS), [p for p in inputs[:4] if p is not None])
    wanted = torch.autograd.grad(scalarise(expected, OUTPUTS), [p for p in wide[:4] if p is not None])
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.double().cpu(), w, rtol=2e-5, atol=5e-5)


def run_on_device(inputs, **options):
    mu, logvar, prior_mu, prior_logvar, sample_id = inputs
    sample = gaussian_rsample_kl(
        mu,
        logvar,
        RNG.to(DEVICE),
        sample_id,
        prior_mu=prior_mu,
        prior_logvar=prior_logvar,
        backend="triton",
        **options,
    )
    return {name: value.cpu() for name, value in sample._asdict().items()}


@pytest.mark.parametrize("name", OUTPUTS)
def test_gaussian_gradient_of_each_output_alone(name):
    inputs = on_device(make_inputs("rows"), torch.float32)
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs[:4]]
    ours = run_on_device(inputs, free_bits=0.2)
    expected = run_reference([*wide, inputs[4].cpu()], 0.2)
    rest = {"allow_unused": True, "materialize_grads": True}
    actual = torch.autograd.grad(scalarise(ours, [name]), inputs[:4], **rest)
    wanted = torch.autograd.grad(scalarise(expected, [name]), wide, **rest)
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.double().cpu(), w, rtol=2e-5, atol=2e-5)


def test_gaussian_padding_bfloat16_and_repeats():
    inputs = on_device(make_inputs(), torch.bfloat16)
    with torch.no_grad():
        inputs[0][2] = float("nan")
    results = []
    for _ in range(2):
        sample = run_on_device(inputs, num_samples=2)
        assert sample["z"].dtype == torch.bfloat16 and (sample["z"][:, 2] == 0).all()
        results.append([*sample.values(), *torch.autograd.grad(scalarise(sample, OUTPUTS), inputs[:2])])
        assert all((g[2] == 0).all() and torch.isfinite(g).all() for g in results[-1][-2:])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    narrow = run([None if t is None else t.cpu() for t in inputs], num_samples=2)
    torch.testing.assert_close(sample["z"], narrow.z, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(sample["kl"], narrow.kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_linear_cross_entropy_rows(options, dtype, small_tiles):
    inputs = make(h=21, v=143, scale=0.5)
    x, weight, target, b = on_device(inputs, dtype)
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, weight, b)]
    g = upstream(23)
    ours = linear_cross_entropy(x, weight, target, bias=b, backend="triton", **options)
    wanted = reference.linear_cross_entropy(wide[0], wide[1], inputs[2], bias=wide[2], **options)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double().cpu(), wanted, rtol=1e-6, atol=1e-5)
    step = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    actual = [t.cpu() for t in grads(ours, (x, weight, b), g.float().to(DEVICE))]
    assert_close(actual, grads(wanted, wide, g), rtol=step, atol=step)


@pytest.mark.parametrize("n, h, v", [(1, 1, 1), (1, 40, 70), (33, 5, 31)])
def test_linear_cross_entropy_odd_sizes_with_the_shipped_tiles(n, h, v):
    inputs = make(n, h, v, bias=False, ignored=(3,))
    x, weight, target, _ = on_device(inputs, torch.float32)
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, weight)]
    g = upstream(n) + 0.3
    ours = linear_cross_entropy(x, weight, target, backend="triton")
    wanted = reference.linear_cross_entropy(*wide, inputs[2])
    torch.testing.assert_close(ours.double().cpu(), wanted, rtol=1e-6, atol=1e-5)
    actual = [t.cpu() for t in grads(ours, (x, weight), g.float().to(DEVICE))]
    assert_close(actual, grads(wanted, wide, g), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_linear_cross_entropy_weight_per_sequence(options, small_tiles):
    inputs = make(h=21, v=143, scale=0.5)
    x, weight, target, b = on_device(inputs, torch.float32)
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, weight, b)]
    w_B = torch.tensor([0.5, 3.0, -1.25, 0.0])

    def ours():
        return linear_cross_entropy(
            x, weight, target, bias=b, cu_seqlens=OFFSETS.to(DEVICE), weight_per_sequence=w_B.to(DEVICE),
            backend="triton", **options,
        )  # fmt: skip

    total, nll_B = ours()
    wanted_B = reference.segment_sum(
        reference.linear_cross_entropy(wide[0], wide[1], inputs[2], bias=wide[2], **options), OFFSETS
    )
    torch.testing.assert_close(nll_B.double().cpu(), wanted_B.detach(), rtol=1e-5, atol=1e-5)
    first = torch.autograd.grad(-2.5 * total, (x, weight, b), retain_graph=True)
    wanted = torch.autograd.grad(-2.5 * (w_B * wanted_B).sum(), wide)
    assert_close([t.cpu() for t in first], wanted, rtol=1e-5, atol=2e-5)
    assert all(torch.equal(p, q) for p, q in zip(first, grads(-2.5 * ours()[0], (x, weight, b), None), strict=True))


def test_linear_cross_entropy_only_what_is_needed_and_no_rows(small_tiles):
    x, weight, target, b = on_device(make(h=21, v=143), torch.float32)
    loss = linear_cross_entropy(x.detach(), weight, target, bias=b.detach(), backend="triton").sum()
    full = linear_cross_entropy(x, weight, target, bias=b, backend="triton").sum()
    assert torch.equal(torch.autograd.grad(loss, weight)[0], torch.autograd.grad(full, weight)[0])
    ignored = torch.full_like(target, -100)
    nothing = linear_cross_entropy(x, weight, ignored, bias=b, reduction="mean", backend="triton")
    assert nothing == 0 and all((g == 0).all() for g in torch.autograd.grad(nothing, (x, weight, b)))
    none = linear_cross_entropy(x[:0], weight, target[:0], bias=b, backend="triton")
    assert none.shape == (0,)
    assert all((g == 0).all() for g in torch.autograd.grad(none.sum(), (weight, b)))


@pytest.mark.parametrize("gap", [-2.0, 2.2, 6.9, 13.8])
def test_linear_cross_entropy_sure_and_hopeless_targets(gap, small_tiles):
    x = torch.tensor([[gap]], device=DEVICE, requires_grad=True)
    weight = torch.zeros(71, 1, device=DEVICE)
    weight[64] = 1.0
    nll = linear_cross_entropy(x, weight, torch.tensor([64], device=DEVICE), backend="triton")
    nll.sum().backward()
    rivals = 70.0 * torch.exp(torch.tensor(-gap, dtype=torch.float64)).item()
    assert nll.item() == pytest.approx(torch.tensor(rivals).log1p().item(), abs=4e-6, rel=1e-6)
    assert x.grad.item() == pytest.approx(-rivals / (1 + rivals), abs=4e-6)


@pytest.mark.parametrize("cap", [30.0, 1e3, 1e5])
def test_softcap_keeps_the_digits_of_logits_far_below_it(cap, small_tiles):
    inputs = make(h=21, v=143, scale=0.5)
    x, weight, target, b = on_device(inputs, torch.float32)
    wide = [t.detach().cpu().double() for t in (x, weight, b)]
    ours = linear_cross_entropy(x, weight, target, bias=b, softcap=cap, backend="triton")
    wanted = reference.linear_cross_entropy(wide[0], wide[1], inputs[2], bias=wide[2], softcap=cap)
    torch.testing.assert_close(ours.double().cpu(), wanted, rtol=1e-6, atol=4e-6)


def test_operands_that_start_anywhere(small_tiles):
    """Parameters are often views of one flat buffer."""
    x, weight, target, b = on_device(make(h=24, v=143), torch.float32)
    shifted = [
        torch.cat([t.new_zeros(1), t.detach().flatten()])[1:].view(t.shape).requires_grad_() for t in (x, weight)
    ]
    assert all(t.data_ptr() % 16 for t in shifted)
    ours = linear_cross_entropy(*shifted, target, bias=b, backend="triton")
    plain = linear_cross_entropy(x, weight, target, bias=b, backend="triton")
    assert torch.equal(ours, plain)
    pairs = zip(torch.autograd.grad(ours.sum(), shifted), torch.autograd.grad(plain.sum(), (x, weight)), strict=True)
    assert all(torch.equal(a, w) for a, w in pairs)


def test_gaussian_key_may_be_strided():
    mu = torch.zeros(3, 4, device=DEVICE)
    ids, keys = torch.arange(3, device=DEVICE), torch.tensor([[3, 7], [5, 9]], device=DEVICE)
    strided = gaussian_rsample_kl(mu, mu, keys[:, 0], ids, backend="triton")
    assert torch.equal(
        strided.z, gaussian_rsample_kl(mu, mu, torch.tensor([3, 5], device=DEVICE), ids, backend="triton").z
    )


def test_gaussian_of_more_rows_than_one_launch_sums_and_of_strided_halves():
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(4100, 6, generator=generator).to(DEVICE)
    mu, logvar = both.chunk(2, dim=-1)
    ids = torch.arange(4100, device=DEVICE)
    ids[7] = -1
    sample = gaussian_rsample_kl(mu, logvar, RNG.to(DEVICE), ids, backend="triton")
    expected = run((mu.cpu(), logvar.cpu(), None, None, ids.cpu()))
    for name, value in expected._asdict().items():
        torch.testing.assert_close(
            getattr(sample, name).cpu(), value, rtol=2e-5, atol=2e-4 if name == "kl_per_dim" else 2e-5
        )


def test_gaussian_free_bits_hide_no_nan():
    mu = torch.tensor([[float("nan"), 0.0], [0.0, 0.0]], device=DEVICE)
    ids = torch.arange(2, device=DEVICE)
    for backend in ("triton", "torch"):
        sample = gaussian_rsample_kl(mu, torch.zeros_like(mu), RNG.to(DEVICE), ids, free_bits=0.5, backend=backend)
        assert torch.isnan(sample.kl_free[0]) and sample.kl_free[1] == 1.0
