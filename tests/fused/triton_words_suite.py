"""The kernels of word dropout and of segment sums: on the GPU where there is one, else in Triton's interpreter.

`test_triton.py` runs this file in a process of its own, because the interpreter must be chosen before Triton is
imported. By hand: TRITON_INTERPRET=1 pytest tests/fused/triton_words_suite.py
"""

import pytest
import torch
from test_embedding_word_dropout import BOS, OPTIONS, PAD, RNG, SIZES, STREAM, UNK, expected_output, make

from vae_kernels import embedding_word_dropout_triton, philox_uniform, reference, segment_sum
from vae_kernels.embedding_word_dropout import _embed, _weight_gradient, embedding_word_dropout
from vae_kernels.segment_sum import _spread, _sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Half a unit for the one rounding; a whole one where Triton's interpreter cuts bfloat16 off instead.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several ragged tiles, and words with whole chunks, at a size the interpreter can afford."""
    monkeypatch.setattr(embedding_word_dropout_triton, "ROWS", 2)
    monkeypatch.setattr(embedding_word_dropout_triton, "MAX_WIDTH", 8)
    monkeypatch.setattr(embedding_word_dropout_triton, "CHUNK", 4)
    monkeypatch.setattr(embedding_word_dropout_triton, "TOKENS_PER_PROGRAM", 16)


@pytest.fixture
def poisoned():
    """Memory that a kernel neither writes nor may read holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_device(*tensors):
    return [t.detach().to(DEVICE) for t in tensors]


def run(tokens, weight, ids, rate=0.4, rng=RNG, **options):
    tokens, ids, rng = on_device(tokens, ids, rng)
    options = OPTIONS | {"backend": "triton"} | options
    return embedding_word_dropout(tokens, weight, rng, ids, rate=rate, **options)


def check_against_float64(tokens, weight, ids, grad, rate=0.4, **options):
    """Values bit for bit, and the gradient of `weight` to float32, rounded once."""
    weight = weight.detach().to(DEVICE).requires_grad_()
    wide = weight.detach().cpu().double().requires_grad_()
    ours = run(tokens, weight, ids, rate, **options)
    wanted = expected_output(tokens, wide, ids, rate=float(rate), **options)
    assert ours.dtype == weight.dtype and torch.equal(ours.cpu().double(), wanted)
    (actual,) = torch.autograd.grad(ours, weight, grad.to(DEVICE))
    (wanted_grad,) = torch.autograd.grad(wanted, wide, grad.double())
    assert actual.dtype == weight.dtype
    torch.testing.assert_close(actual.cpu().double(), wanted_grad, rtol=1.02 * ROUNDING[weight.dtype], atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [*SIZES[:2], (3, 7, 6, 19), (8, 11, 5, 4)], ids=str)
def test_words_and_gradient(sizes, dtype, small_tiles, poisoned):
    check_against_float64(*make(*sizes, dtype=dtype))


def test_words_and_gradient_with_the_shipped_tiles(poisoned):
    # One word has most of 400 rows: whole chunks of it, with rows before and after.
    check_against_float64(*make(8, 50, 5, 4, dtype=torch.float32), rate=0.8)
    check_against_float64(*make(3, 7, 6, 300, dtype=torch.float32))


@pytest.mark.parametrize("rate", [0.0, 1.0, torch.tensor(0.7), torch.tensor(0.3, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("keep_ids", [(), (PAD,), (9, BOS, PAD)], ids=str)
def test_rates_kept_words_and_the_last_stream(rate, keep_ids, small_tiles):
    # Stream 255 sets the counter's top bit.
    check_against_float64(*make(dtype=torch.float32), rate=rate, keep_ids=keep_ids, stream=255)


def test_a_number_equal_to_the_rate_replaces_nothing(small_tiles):
    tokens, weight, ids, grad = make(dtype=torch.float32)
    uniform_BT = philox_uniform(RNG, ids[:, None], torch.arange(tokens.shape[1]), stream=STREAM)
    place = (tokens != UNK).nonzero()[0]
    check_against_float64(tokens, weight, ids, grad, rate=uniform_BT[tuple(place)], keep_ids=())


def test_strided_inputs_and_repeats(small_tiles):
    tokens, _, ids, grad = make(16, 11, 13, 11, dtype=torch.float32)
    weight = torch.randn(13, 22, device=DEVICE, requires_grad=True)
    grad = grad.transpose(0, 1).contiguous().transpose(0, 1).to(DEVICE)
    strided = [torch.stack((t, t + 1), -1)[..., 0] for t in (tokens, ids, RNG)]
    results = []
    for given, given_ids, rng in ((tokens, ids, RNG), strided):
        ours = run(given, weight[:, ::2], given_ids, rng=rng)
        results.append((ours, *torch.autograd.grad(ours, weight, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    wide = weight.detach().cpu().double().requires_grad_()
    wanted = expected_output(tokens, wide[:, ::2], ids)
    assert torch.equal(results[0][0].cpu().double(), wanted)
    (wanted_grad,) = torch.autograd.grad(wanted, wide, grad.cpu().double())
    torch.testing.assert_close(results[0][1].cpu().double(), wanted_grad, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("b, t, e", [(0, 9, 11), (5, 0, 11), (5, 9, 0)])
def test_nothing_to_embed(b, t, e):
    weight = torch.randn(13, e, device=DEVICE, requires_grad=True)
    ours = run(torch.zeros(b, t, dtype=torch.int64), weight, torch.arange(b))
    assert ours.shape == (b, t, e)
    assert (torch.autograd.grad(ours.sum(), weight)[0] == 0).all()


def test_a_table_of_more_than_two_to_the_31_elements():
    # Only the pages that are written take memory on the CPU.
    weight = torch.empty(2**15 + 3, 2**16, dtype=torch.float16, device=DEVICE)
    weight[-1] = torch.arange(2**16) % 1000
    weight[UNK] = -1.0
    tokens = torch.full((1, 2), len(weight) - 1)
    ours = run(tokens, weight, torch.tensor([0]), rate=0.0)
    assert torch.equal(ours, weight[-1].expand(1, 2, -1))


def test_more_kept_words_than_the_kernels_take():
    tokens, weight, ids, _ = make(v=100, dtype=torch.float32)
    with pytest.raises(ValueError, match="at most 64 keep_ids, got 65; use backend='torch'"):
        run(tokens, weight.to(DEVICE), ids, keep_ids=tuple(range(65)))


def test_registration_of_word_dropout(small_tiles):
    tokens, weight, ids, grad, rng = on_device(*make(dtype=torch.float32), RNG)
    noise = (rng, ids, torch.tensor(0.4, device=DEVICE), UNK, [PAD, BOS], STREAM)
    torch.library.opcheck(_embed, (tokens, weight.requires_grad_(), *noise, "triton"))
    torch.library.opcheck(_weight_gradient, (grad, tokens, *noise, 13, "triton"))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        ours = function(tokens, weight, ids, rate=torch.tensor(0.4, device=DEVICE))
        results.append((ours, *torch.autograd.grad(ours, weight, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Sequences that are empty, shorter and longer than a tile, and a multiple of it.
OFFSETS = torch.tensor([0, 3, 3, 4, 132, 700, 956])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_segment_sums(dtype, index, poisoned):
    x_N = torch.randn(956, device=DEVICE).to(dtype).requires_grad_()
    wide_N = x_N.detach().cpu().double().requires_grad_()
    upstream_B = torch.tensor([1.5, 7.0, -2.0, 0.0, 0.3, -1.0], dtype=dtype)
    y_B = segment_sum(x_N, OFFSETS.to(DEVICE, index), backend="triton")
    wanted_B = reference.segment_sum(wide_N, OFFSETS)
    torch.testing.assert_close(y_B.cpu().double(), wanted_B, rtol=1.02 * ROUNDING[dtype], atol=2e-5)
    (grad_N,) = torch.autograd.grad(y_B, x_N, upstream_B.to(DEVICE))
    assert grad_N.dtype == dtype
    assert torch.equal(grad_N.cpu().double(), torch.autograd.grad(wanted_B, wide_N, upstream_B.double())[0])


def test_segment_sums_in_any_company_strided_and_twice():
    x_N, offsets = torch.randn(956, 2, device=DEVICE, requires_grad=True), OFFSETS.to(DEVICE)
    whole_B = segment_sum(x_N[:, 0], offsets, backend="triton")
    for index, (a, b) in enumerate(zip(OFFSETS.tolist()[:-1], OFFSETS.tolist()[1:], strict=True)):
        alone = segment_sum(x_N[a:b, 0], torch.tensor([0, b - a], device=DEVICE), backend="triton")
        assert torch.equal(alone[0], whole_B[index])
    (first,) = torch.autograd.grad((whole_B**3).sum(), x_N, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x_N)
    # With s a sequence's sum and n its length: first is 3 s^2, second the derivative of 9 n s^4.
    per_sequence = 36 * OFFSETS.diff() * whole_B.detach().cpu() ** 3
    torch.testing.assert_close(second[:, 0].cpu(), per_sequence.repeat_interleave(OFFSETS.diff()), rtol=1e-5, atol=1e-3)
    assert (second[:, 1] == 0).all()
    assert segment_sum(torch.zeros(0, device=DEVICE), offsets[:1], backend="triton").shape == (0,)


def test_registration_of_segment_sums():
    x_N, y_B = (torch.randn(n, device=DEVICE, requires_grad=True) for n in (956, 6))
    torch.library.opcheck(_sum, (x_N, OFFSETS.to(DEVICE), "triton"))
    torch.library.opcheck(_spread, (y_B, OFFSETS.to(DEVICE), 956, "triton"))
