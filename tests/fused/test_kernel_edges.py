"""linear_cross_entropy at its edges: compiled passes, poisoned memory, hopeless rows, NaN, huge and empty inputs."""

import functools
import itertools
import logging
import threading

import pytest
import torch
from test_linear_cross_entropy import OPTIONS, assert_close, make, upstream
from torch._dynamo.exc import TorchDynamoException

from vae_kernels import linear_cross_entropy, linear_cross_entropy_torch, reference

WEIGHT_B = torch.tensor([0.5, 3.0, -1.25, 0.25])
FORMS = pytest.mark.parametrize("weighted", [False, True], ids=["rows", "weighted"])


@pytest.fixture(params=[False, True], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Everything in one chunk, or chunks of few rows, the last one ragged."""
    if request.param:
        monkeypatch.setattr(linear_cross_entropy_torch, "WORKSPACE_BYTES", 1200)


@pytest.fixture
def compiled(monkeypatch):
    """Passes of every size are compiled, from a fresh start."""
    monkeypatch.setattr(linear_cross_entropy_torch, "COMPILE_ELEMENTS", 0)
    _forget()
    yield
    _forget()


def _forget():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    linear_cross_entropy_torch._cached_passes.cache_clear()


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody wrote holds NaN, the workspace that is kept between calls included."""
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(linear_cross_entropy_torch, "_LOCAL", threading.local())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def offsets_of(n):
    return torch.tensor([0, n // 4, n // 4, n // 2, n])


def run(inputs, weighted=False, scorer=linear_cross_entropy, **options):
    """[losses (of rows; weighted: total and of sequences), gradients of x, weight and bias]."""
    x, weight, target, b = inputs
    tensors, offsets = [t for t in (x, weight, b) if t is not None], offsets_of(len(x))
    if scorer is reference.linear_cross_entropy or not weighted:
        nll_N = scorer(x, weight, target, bias=b, **options)
        g_N = upstream(len(x)) if not weighted else WEIGHT_B.double().repeat_interleave(offsets.diff())
        gradients = torch.autograd.grad(nll_N, tensors, g_N.to(nll_N.dtype))
        if not weighted:
            return [nll_N.detach(), *gradients]
        nll_B = reference.segment_sum(nll_N.detach(), offsets)
        return [(nll_B * WEIGHT_B).sum(), nll_B, *gradients]
    total, nll_B = scorer(x, weight, target, bias=b, cu_seqlens=offsets, weight_per_sequence=WEIGHT_B, **options)
    return [total.detach(), nll_B, *torch.autograd.grad(total, tensors)]


def copies(inputs, dtype=torch.float64):
    """Leaf copies, floating ones in `dtype`."""
    return [
        t if t is None or not t.is_floating_point() else t.detach().to(dtype).clone().requires_grad_() for t in inputs
    ]


def expected(inputs, weighted=False, **options):
    return run(copies(inputs), weighted, reference.linear_cross_entropy, **options)


def assert_equal(actual, wanted):
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


def assert_as_close_as_torch(inputs, weighted=False, **options):
    """|ours - float64| <= 2 |torch in the same dtype - float64| + 1e-4."""
    ours, wanted = run(inputs, weighted, **options), expected(inputs, weighted, **options)
    plain = run(copies(inputs, inputs[0].dtype), weighted, reference.linear_cross_entropy, **options)
    for o, p, w in zip(ours, plain, wanted, strict=True):
        assert (o.double() - w).abs().max() <= 2 * (p.double() - w).abs().max() + 1e-4


PASSES = [
    *((torch.float32, o) for o in ({}, {"bias": True}, {"softcap": 3.0}, {"label_smoothing": 0.1}, {"z_loss": 1e-2})),
    *((torch.bfloat16, o) for o in ({"bias": True}, {"softcap": 3.0}, {"label_smoothing": 0.1, "z_loss": 1e-2})),
]


@pytest.mark.long
@pytest.mark.parametrize("dtype, options", PASSES, ids=str)
def test_compiled_passes(dtype, options, compiled):
    options = dict(options)
    inputs = make(96, 64, 517, dtype, bias=options.pop("bias", False), scale=0.3)
    assert_as_close_as_torch(inputs, **options)
    assert_as_close_as_torch(inputs, weighted=True, **options)
    if dtype == torch.float32:
        rows = run(inputs, **options)[0].double() - expected(inputs, **options)[0]
        assert rows.abs().max() <= 1e-5
    # Both passes, of which nothing fell back to eager torch.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2


@pytest.mark.long
def test_many_variants_stay_compiled(compiled, monkeypatch):
    """torch.compile gives up, and says so in its own log only, on a function that it has compiled eight times."""
    runs = []

    def backend(graph, _):
        def run_graph(*arguments):
            runs.append(1)
            return graph(*arguments)

        return run_graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for dtype, bias in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        for options in OPTIONS[:4]:
            before = len(runs)
            run(make(dtype=dtype, bias=bias), **options)
            assert len(runs) == before + 2, f"{dtype}, bias {bias}, {options} ran uncompiled"


@pytest.mark.parametrize("message", ["no working C++ compiler\nand more", ""])
def test_failed_compilation_falls_back_and_says_so_once(message, compiled, monkeypatch, caplog):
    inputs = make(dtype=torch.float32)
    monkeypatch.setattr(linear_cross_entropy_torch, "COMPILE_ELEMENTS", 2**40)
    wanted = [run(inputs, weighted, softcap=cap) for weighted in (False, True) for cap in (None, 3.0)]

    def failing(function, **_):
        def call(*_):
            raise TorchDynamoException(message)

        return call

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(linear_cross_entropy_torch, "COMPILE_ELEMENTS", 0)
    with caplog.at_level(logging.WARNING, logger="vae_kernels"):
        found = [run(inputs, weighted, softcap=cap) for weighted in (False, True) for cap in (None, 3.0)]
    for f, w in zip(found, wanted, strict=True):
        assert_equal(f, w)
    told = [record.getMessage() for record in caplog.records]
    assert all("C++ compiler (g++)" in text and message.partition("\n")[0] in text for text in told)
    # One for each of the two passes, however many options.
    assert len(told) == len(set(told)) == 2


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize("saved", [0, 7 * 29 * 4, 2**31], ids=["none kept", "some kept", "all kept"])
@FORMS
def test_poisoned_memory_is_never_read(weighted, saved, options, chunks, poisoned):
    inputs = make(dtype=torch.float32)
    assert torch.empty(3).isnan().all()
    found = run(inputs, weighted, max_saved_bytes=saved, **options)
    assert_close(found, expected(inputs, weighted, **options), rtol=1e-5, atol=1e-5)
    linear_cross_entropy_torch._LOCAL.memory.fill_(255)
    assert_equal(run(inputs, weighted, max_saved_bytes=saved, **options), found)
    ignored = (*inputs[:2], torch.full_like(inputs[2], -100), inputs[3])
    assert all((t == 0).all() for t in run(ignored, weighted, max_saved_bytes=saved, **options))
    none = (inputs[0].detach()[:0].requires_grad_(), inputs[1], inputs[2][:0], inputs[3])
    assert all((t == 0).all() for t in run(none, weighted, max_saved_bytes=saved, **options))


@pytest.mark.parametrize("gap", [-1000.0, -160.0, -80.0, -60.0, 60.0, 160.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FORMS
def test_targets_beyond_a_floats_range(weighted, dtype, gap):
    """p(target) down to exp(-1000), where the odds against the target overflow, and up to 1 - exp(-1000)."""
    x = torch.full((8, 1), gap)
    x[1::2] = 0.5
    weight = torch.zeros(31, 1)
    weight[4] = 1.0
    inputs = copies((x, weight, torch.full((8,), 4), torch.linspace(-1.0, 1.0, 31)), dtype)
    ours, wanted = run(inputs, weighted), expected(inputs, weighted)
    assert_close(ours[:-3], wanted[:-3], rtol=2e-6, atol=2e-6)
    if dtype == torch.float32:
        assert_close(ours[-3:], wanted[-3:], rtol=5e-6, atol=2e-6)
    assert_as_close_as_torch(inputs, weighted)


@FORMS
def test_hopeless_rows_leave_others_as_they_were(weighted, chunks):
    inputs = make(dtype=torch.float32, ignored=(3,))
    x, _, target, _ = inputs
    clean = run(inputs, weighted)
    hopeless = [2, 9, 22]
    with torch.no_grad():
        for row in hopeless:
            # Far from the target, near to another word.
            x[row] = 60.0 * (inputs[1][(target[row] + 1) % 29] - inputs[1][target[row]])
    found = run(inputs, weighted)
    others = [row for row in range(23) if row not in hopeless]
    wanted = expected(inputs, weighted)
    assert reference.linear_cross_entropy(*inputs[:3], bias=inputs[3])[hopeless].min() > 150.0
    assert torch.equal(found[-3][others], clean[-3][others])
    assert weighted or torch.equal(found[0][others], clean[0][others])
    assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_of_nan_is_the_only_one(options, chunks):
    inputs = make(dtype=torch.float32)
    clean = run(inputs, **options)
    with torch.no_grad():
        inputs[0][5, 2] = float("nan")
    nll_N, grad_x_NH, *_ = run(inputs, **options)
    others = torch.arange(23) != 5
    assert nll_N[5].isnan() and grad_x_NH[5].isnan().all()
    assert torch.equal(nll_N[others], clean[0][others]) and torch.equal(grad_x_NH[others], clean[1][others])


@pytest.mark.parametrize("n, h, v", [(1, 1, 1), (1, 1, 5), (5, 1, 1), (1, 7, 1), (4, 7, 1), (4, 1, 2)])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
@FORMS
def test_sizes_of_one(weighted, options, n, h, v):
    inputs = make(n, h, v, torch.float32, ignored=(3,))
    assert_close(run(inputs, weighted, **options), expected(inputs, weighted, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_kept_and_recomputed_rows_agree(options, dtype, chunks):
    inputs = make(dtype=dtype, scale=0.5)
    none, some, all_rows = (run(inputs, max_saved_bytes=k, **options) for k in (0, 9 * 29 * dtype.itemsize, 2**31))
    # The same products, in the same chunks.
    assert_equal(all_rows, none)
    step = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
    assert_close(some, none, rtol=step, atol=step)


@FORMS
def test_strided_and_expanded(weighted, chunks):
    x, weight, target, b = make(h=14)
    inputs = (x[:, ::2], weight[:1, 1::2].expand(29, 7), target, b)
    assert_close(run(inputs, weighted), expected(inputs, weighted), rtol=1e-11, atol=1e-12)
    inputs = (x[4:5, :7].expand(23, 7), weight.t()[7:].t(), target[:1].expand(23), b[:1].expand(29))
    assert_close(run(inputs, weighted), expected(inputs, weighted), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_engines_own_call(autocast, chunks):
    """Weights of padding sequences are zero, offsets int32, some sequences empty, the last ones only padding."""
    x, weight, target, b = make(dtype=torch.float32, ignored=())
    with torch.no_grad():
        x[15:] *= 1e4
    offsets = torch.tensor([0, 0, 6, 6, 15, 19, 23, 23], dtype=torch.int32)
    w_B = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, nll_B = linear_cross_entropy(
            x, weight, target, bias=b, cu_seqlens=offsets, weight_per_sequence=w_B, backend="auto"
        )
    found = torch.autograd.grad(total / 4, (x, weight, b))
    narrow = [t.detach().bfloat16() if autocast else t for t in (x, weight)]
    wide = copies((*narrow, target, b))
    nll_N = reference.linear_cross_entropy(wide[0], wide[1], target, bias=wide[3])
    wanted = torch.autograd.grad(nll_N[:15].sum() / 4, (wide[0], wide[1], wide[3]))
    step = 2e-2 if autocast else 1e-5
    assert_close(
        [total, nll_B[:4]], [nll_N[:15].sum(), reference.segment_sum(nll_N, offsets)[:4]], rtol=step, atol=step
    )
    assert_close(found, wanted, rtol=step, atol=step)
    assert (found[0][15:] == 0).all() and (nll_B[[0, 2, 6]] == 0).all()


@FORMS
def test_a_huge_offset_of_all_logits(weighted):
    inputs = make(96, 64, 517, torch.float32, scale=0.3)
    with torch.no_grad():
        inputs[3].copy_(1e4)
    assert_as_close_as_torch(inputs, weighted)
    narrow = [*copies(inputs[:2], torch.bfloat16), *inputs[2:]]
    assert_close(run(narrow, weighted), expected(narrow, weighted), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FORMS
def test_ignored_rows_with_huge_logits(weighted, dtype, options, chunks):
    """Logits of 1e20, whose square overflows, in rows that do not count: as if those rows held anything else."""
    inputs = make(dtype=dtype, scale=0.5, ignored=(0, 3, 11))
    clean = run(inputs, weighted, **options)
    with torch.no_grad():
        inputs[0][[0, 3, 11]] = 1e20
    found = run(inputs, weighted, **options)
    assert_equal(found, clean)
    assert (found[-3][[0, 3, 11]] == 0).all()


def test_annealed_options_compile_nothing_new(compiled):
    linear_cross_entropy_torch._cached_passes.cache_clear()
    inputs = make(dtype=torch.float32, ignored=())
    for i in range(5):
        found = run(inputs, z_loss=1e-3 * i, label_smoothing=0.1 + 0.01 * i, ignore_index=-100 - i)
        assert torch.isfinite(found[0]).all()
    assert linear_cross_entropy_torch._cached_passes.cache_info().currsize == 1
