"""linear_cross_entropy, torch backend: values and every gradient against the float64 reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vae_kernels import linear_cross_entropy, linear_cross_entropy_ops, linear_cross_entropy_torch, reference

OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 3.0},
    {"logit_scale": 0.7},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0, "logit_scale": 1.3},
]
OFFSETS = torch.tensor([0, 4, 4, 9, 23])


@pytest.fixture(autouse=True, params=[False, True], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Each test runs with everything in one chunk and with chunks of few rows, the last one ragged."""
    if request.param:
        monkeypatch.setattr(linear_cross_entropy_torch, "WORKSPACE_BYTES", 1200)


def make(n=23, h=7, v=29, dtype=torch.float64, bias=True, ignored=(3, 11), scale=1.0, seed=0):
    """(x, weight, target, bias); the rows of `ignored` are masked."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    x, weight = draw(n, h), draw(v, h)
    target = torch.randint(0, v, (n,), generator=generator)
    for row in ignored:
        if row < n:
            target[row] = -100
    return x, weight, target, draw(v) if bias else None


def upstream(n, seed=1):
    """Per-row gradients with every sign, some zero."""
    g = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g[::4] = 0.0
    return g


def grads(loss, tensors, g):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None], g)


def assert_close(actual, wanted, **tolerance):
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.double(), w.double(), **tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_rows_and_gradients_float64(options, bias):
    x, weight, target, b = make(bias=bias)
    ours = linear_cross_entropy(x, weight, target, bias=b, **options)
    wanted = reference.linear_cross_entropy(x, weight, target, bias=b, **options)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    g = upstream(len(target))
    assert_close(grads(ours, (x, weight, b), g), grads(wanted, (x, weight, b), g), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n, h, v", [(1, 1, 1), (1, 33, 257), (65, 3, 2), (130, 17, 1001)])
def test_odd_sizes_float32(n, h, v):
    x, weight, target, b = make(n, h, v, torch.float32, ignored=(3,))
    wide = [t.detach().double().requires_grad_() for t in (x, weight, b)]
    ours = linear_cross_entropy(x, weight, target, bias=b)
    wanted = reference.linear_cross_entropy(wide[0], wide[1], target, bias=wide[2])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=1e-5)
    g = upstream(n)
    actual = grads(ours, (x, weight, b), g.float())
    assert_close(actual, grads(wanted, wide, g), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_bfloat16_is_as_close_as_torch(options):
    x, weight, target, b = make(96, 64, 517, torch.bfloat16, scale=0.3)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, b)]
    plain = [t.detach().clone().requires_grad_() for t in (x, weight, b)]
    g = upstream(96)
    ours = linear_cross_entropy(x, weight, target, bias=b, **options)
    wanted = reference.linear_cross_entropy(wide[0], wide[1], target, bias=wide[2], **options)
    theirs = reference.linear_cross_entropy(plain[0], plain[1], target, bias=plain[2], **options)
    assert ours.dtype == torch.float32
    triples = [(ours, wanted, theirs)]
    triples += zip(
        grads(ours, (x, weight, b), g.float()),
        grads(wanted, wide, g),
        grads(theirs, plain, g.bfloat16()),
        strict=True,
    )
    for a, w, t in triples:
        assert (a.double() - w).abs().max() <= 2 * (t.double() - w).abs().max() + 1e-4


@pytest.mark.parametrize("reduction", ["none", "sequence", "sum", "mean"])
def test_reductions(reduction):
    x, weight, target, b = make()
    rows = reference.linear_cross_entropy(x, weight, target, bias=b)
    wanted = {
        "none": rows,
        "sequence": reference.segment_sum(rows, OFFSETS),
        "sum": rows.sum(),
        "mean": F.cross_entropy(x @ weight.t() + b, target),
    }[reduction]
    ours = linear_cross_entropy(x, weight, target, bias=b, cu_seqlens=OFFSETS, reduction=reduction)
    torch.testing.assert_close(ours, wanted)
    g = upstream(max(1, wanted.numel()), seed=2).reshape(wanted.shape) - 1.7
    assert_close(grads(ours, (x, weight, b), g), grads(wanted, (x, weight, b), g))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_weight_per_sequence(options, offsets_dtype):
    x, weight, target, b = make()
    w_B = torch.tensor([0.5, 3.0, -1.25, 0.0], requires_grad=True)
    total, nll_B = linear_cross_entropy(
        x, weight, target, bias=b, cu_seqlens=OFFSETS.to(offsets_dtype), weight_per_sequence=w_B, **options
    )
    rows = reference.linear_cross_entropy(x, weight, target, bias=b, **options)
    wanted_B = reference.segment_sum(rows, OFFSETS)
    wanted = (w_B.detach() * wanted_B).sum()
    torch.testing.assert_close(nll_B, wanted_B.detach())
    torch.testing.assert_close(total, wanted)
    assert not nll_B.requires_grad
    g = torch.tensor(-2.5, dtype=torch.float64)
    assert_close(grads(total, (x, weight, b), g), grads(wanted, (x, weight, b), g), rtol=1e-11, atol=1e-12)
    assert w_B.grad is None


def test_weight_per_sequence_without_gradients_forms_none(monkeypatch):
    x, weight, target, b = make()
    arguments = {"bias": b, "cu_seqlens": OFFSETS, "weight_per_sequence": torch.ones(4)}
    expected = linear_cross_entropy(x, weight, target, **arguments)

    def fail(*_):
        raise AssertionError("gradients were formed")

    monkeypatch.setattr(linear_cross_entropy_ops, "score_and_gradients", fail)
    with torch.no_grad():
        silent = linear_cross_entropy(x, weight, target, **arguments)
    frozen = linear_cross_entropy(x.detach(), weight.detach(), target, **(arguments | {"bias": b.detach()}))
    for total, nll_B in (silent, frozen):
        assert torch.equal(total, expected[0].detach()) and torch.equal(nll_B, expected[1])
        assert not total.requires_grad


@pytest.mark.parametrize("weighted", [False, True])
def test_only_the_gradients_asked_for(weighted):
    x, weight, target, b = make()
    extra = {"cu_seqlens": OFFSETS, "weight_per_sequence": torch.tensor([1.0, 2.0, 3.0, -1.0])} if weighted else {}

    def loss(*tensors):
        out = linear_cross_entropy(tensors[0], tensors[1], target, bias=tensors[2], **extra)
        return out[0] if weighted else out.sum()

    full = torch.autograd.grad(loss(x, weight, b), (x, weight, b))
    for wanted in itertools.product([False, True], repeat=3):
        if not any(wanted):
            continue
        tensors = [t.detach().requires_grad_(r) for t, r in zip((x, weight, b), wanted, strict=True)]
        loss(*tensors).backward()
        for tensor, gradient, needed in zip(tensors, full, wanted, strict=True):
            assert torch.equal(tensor.grad, gradient) if needed else tensor.grad is None


@pytest.mark.parametrize("weighted", [False, True])
def test_all_rows_ignored(weighted):
    x, weight, target, b = make(ignored=range(23))
    extra = {"weight_per_sequence": torch.ones(4)} if weighted else {"reduction": "mean"}
    out = linear_cross_entropy(x, weight, target, bias=b, cu_seqlens=OFFSETS, **extra)
    loss = out[0] if weighted else out
    assert loss == 0.0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, weight, b)))


@pytest.mark.parametrize("reduction", ["none", "sequence", "sum", "mean"])
def test_no_rows(reduction):
    x, weight, target, b = make(n=0, ignored=())
    out = linear_cross_entropy(x, weight, target, bias=b, cu_seqlens=torch.tensor([0, 0, 0]), reduction=reduction)
    assert (out == 0).all() and out.shape == {"none": (0,), "sequence": (2,)}.get(reduction, ())
    out.sum().backward()
    assert (weight.grad == 0).all() and x.grad.shape == (0, 7)


def test_ignore_index_may_be_a_word():
    x, weight, target, b = make(ignored=())
    target[5] = 0
    ours = linear_cross_entropy(x, weight, target, bias=b, ignore_index=0)
    wanted = F.cross_entropy(x @ weight.t() + b, target, ignore_index=0, reduction="none")
    torch.testing.assert_close(ours, wanted)
    assert ours[5] == 0


@pytest.mark.parametrize("gap", [-2.0, 2.2, 4.6, 6.9, 13.8, 40.0])
def test_sure_and_hopeless_targets(gap):
    """One hidden unit sets the target's lead over 30 equal rivals: p(target) from 0.005 to 1 - 1e-16."""
    x = torch.tensor([[gap]], requires_grad=True)
    weight = torch.zeros(31, 1)
    weight[4] = 1.0
    weight.requires_grad_()
    nll = linear_cross_entropy(x, weight, torch.tensor([4]))
    nll.sum().backward()
    rivals = 30.0 * torch.exp(torch.tensor(-gap, dtype=torch.float64))
    assert nll.item() == pytest.approx(float(torch.log1p(rivals)), abs=4e-6, rel=1e-6)
    # p - 1 at the target, to the accuracy of float32 logits; rounded to bfloat16 it would be off by 4e-3.
    assert float(x.grad) == pytest.approx(float(-rivals / (1 + rivals)), abs=4e-6)


def test_bfloat16_gradient_of_a_sure_target():
    x = torch.tensor([[9.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(31, 1, dtype=torch.bfloat16)
    weight[4] = 1.0
    linear_cross_entropy(x, weight, torch.tensor([4])).sum().backward()
    p = 1.0 / (1.0 + 30.0 * float(torch.exp(torch.tensor(-9.0, dtype=torch.float64))))
    assert float(x.grad) == pytest.approx(p - 1.0, rel=1e-2)


def test_large_logits_do_not_overflow():
    x, weight, target, _ = make(bias=False, dtype=torch.float32, scale=60.0)
    ours = linear_cross_entropy(x, weight, target)
    wanted = F.cross_entropy(x.double() @ weight.double().t(), target, reduction="none")
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=1e-2)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(ours.sum(), (x, weight)))


@pytest.mark.parametrize("weighted", [False, True])
def test_retain_graph_and_bitwise_repeats(weighted):
    x, weight, target, b = make(dtype=torch.float32)
    extra = {"cu_seqlens": OFFSETS, "weight_per_sequence": torch.tensor([1.0, 2.0, 3.0, -1.0])} if weighted else {}

    def loss():
        out = linear_cross_entropy(x, weight, target, bias=b, **extra)
        return out[0] if weighted else out.square().sum()

    once = loss()
    first = torch.autograd.grad(once, (x, weight, b), retain_graph=True)
    second = torch.autograd.grad(once, (x, weight, b))
    third = torch.autograd.grad(loss(), (x, weight, b))
    for p, q, r in zip(first, second, third, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


def test_strided_and_expanded_inputs():
    x, weight, target, _ = make(bias=False)
    wide_x = torch.stack([x, -x], dim=1).detach().requires_grad_()
    tall_w = weight.t().contiguous().detach().requires_grad_()
    ours = linear_cross_entropy(wide_x[:, 0], tall_w.t(), target.repeat_interleave(2)[::2])
    wanted = reference.linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(ours, wanted)
    # sum() hands backward an expanded gradient of stride zero.
    actual = torch.autograd.grad(ours.sum(), (wide_x, tall_w))
    expected = torch.autograd.grad(wanted.sum(), (x, weight))
    torch.testing.assert_close(actual[0][:, 0], expected[0])
    torch.testing.assert_close(actual[1], expected[1].t())


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_gradcheck(options):
    x, weight, target, b = make(6, 3, 5, ignored=(3,))
    offsets, w_B = torch.tensor([0, 2, 6]), torch.tensor([0.3, -2.0])

    def rows(*t):
        return linear_cross_entropy(t[0], t[1], target, bias=t[2], **options)

    def weighted(*t):
        return linear_cross_entropy(
            t[0], t[1], target, bias=t[2], cu_seqlens=offsets, weight_per_sequence=w_B, **options
        )[0]

    assert torch.autograd.gradcheck(rows, (x, weight, b))
    assert torch.autograd.gradcheck(weighted, (x, weight, b))


def test_second_derivatives_are_refused():
    x, weight, target, _ = make(bias=False)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(x, weight, target).sum(), x, create_graph=True)


def test_autocast_and_a_wider_weight():
    x, weight, target, b = make(dtype=torch.float32)
    narrow = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), target, bias=b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_cross_entropy(x, weight, target, bias=b)
    assert cast.dtype == torch.float32 and torch.equal(cast, narrow)
    mixed = linear_cross_entropy(x.bfloat16(), weight, target, bias=b)
    assert torch.equal(mixed, narrow)
    assert torch.autograd.grad(mixed.sum(), weight)[0].dtype == torch.float32


def test_bad_arguments_are_refused():
    x, weight, target, b = make()
    cases = [
        (ValueError, "x must be", {"x": x[:, :3]}),
        (TypeError, "floating point", {"x": torch.ones(23, 7, dtype=torch.int64)}),
        (ValueError, "target must be int64", {"target": target.int()}),
        (IndexError, "in \\[0, 29\\)", {"target": target + 20}),
        (ValueError, "bias must have shape", {"bias": b[:4]}),
        (ValueError, "reduction is 'avg'", {"reduction": "avg"}),
        (ValueError, "need cu_seqlens", {"reduction": "sequence"}),
        (ValueError, "need cu_seqlens", {"weight_per_sequence": torch.ones(4)}),
        (
            ValueError,
            "must have shape \\(4,\\)",
            {"weight_per_sequence": torch.ones(3), "cu_seqlens": OFFSETS},
        ),
        (
            ValueError,
            "fixes the reduction",
            {"weight_per_sequence": torch.ones(4), "cu_seqlens": OFFSETS, "reduction": "sum"},
        ),
        (ValueError, "label_smoothing", {"label_smoothing": 1.0}),
        (ValueError, "softcap", {"softcap": 0.0}),
        (ValueError, "max_saved_bytes", {"max_saved_bytes": -1}),
        (ValueError, "backend", {"backend": "gpu"}),
    ]
    for error, message, change in cases:
        arguments = {"x": x, "weight": weight, "target": target, "bias": b} | change
        with pytest.raises(error, match=message):
            linear_cross_entropy(**arguments)
