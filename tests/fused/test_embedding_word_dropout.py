"""Word dropout on the way into an embedding: which words, what they cost in gradient, and what is kept of it."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from vae_kernels import philox_uniform, reference
from vae_kernels.embedding_word_dropout import _embed, _weight_gradient, embedding_word_dropout

RNG = torch.tensor([1234, 7])
PAD, BOS, UNK, STREAM = 0, 2, 3, 1
OPTIONS = {"unk_id": UNK, "keep_ids": (PAD, BOS), "stream": STREAM}
# B, T, V, E: odd sizes, the smallest, wide rows, and few words with many occurrences.
SIZES = [(5, 9, 13, 11), (1, 1, 4, 1), (3, 7, 6, 300), (8, 50, 5, 4)]


def make(b=5, t=9, v=13, e=11, dtype=torch.float64):
    """Tokens with the last word at least once, ids of every kind, a weight and a gradient with zeros and signs."""
    generator = torch.Generator().manual_seed(b + t)
    tokens_BT = torch.randint(0, v, (b, t), generator=generator)
    tokens_BT[-1, -1] = v - 1
    ids_B = torch.randint(-(2**62), 2**62, (b,), generator=generator)
    ids_B[0] = 5
    weight_VE = torch.randn(v, e, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    grad_BTE = torch.randn(b, t, e, generator=generator, dtype=torch.float64) * torch.arange(b).sub(1)[:, None, None]
    return tokens_BT, weight_VE, ids_B, grad_BTE.to(dtype)


def expected_output(tokens_BT, weight_VE, ids_B, rate=0.4, **options):
    options = OPTIONS | options
    position_T = torch.arange(tokens_BT.shape[1])
    uniform_BT = philox_uniform(RNG, ids_B[:, None], position_T, stream=options.pop("stream"))
    return reference.embedding_word_dropout(tokens_BT, weight_VE, uniform_BT, rate=rate, **options)


def words(tokens_BT, ids_B, rng=RNG, vocab=100, **options):
    """The tokens that are embedded, read from a weight whose rows are their numbers."""
    weight_V1 = torch.arange(vocab, dtype=torch.float64)[:, None]
    options = OPTIONS | {"rate": 0.4} | options
    return embedding_word_dropout(tokens_BT, weight_V1, rng, ids_B, **options)[..., 0].long()


@pytest.mark.parametrize("keep_ids", [(), (PAD,), (BOS, PAD, BOS)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradient(sizes, keep_ids):
    tokens, weight, ids, grad = make(*sizes)
    ours = embedding_word_dropout(tokens, weight, RNG, ids, rate=0.4, **(OPTIONS | {"keep_ids": keep_ids}))
    wanted = expected_output(tokens, weight, ids, keep_ids=keep_ids)
    assert torch.equal(ours, wanted)
    (actual_VE,) = torch.autograd.grad(ours, weight, grad)
    torch.testing.assert_close(actual_VE, torch.autograd.grad(wanted, weight, grad)[0], rtol=1e-12, atol=1e-12)


def test_gradcheck():
    tokens, weight, ids, _ = make(e=3)
    assert torch.autograd.gradcheck(
        lambda w: embedding_word_dropout(tokens, w, RNG, ids, rate=0.4, **OPTIONS), (weight,)
    )


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["number", "float32", "float64"])
def test_the_words_that_are_replaced(rate, kind):
    tokens, ids = torch.randint(0, 100, (40, 30)), torch.arange(40) * 2**35
    uniform_BT = philox_uniform(RNG, ids[:, None], torch.arange(30), stream=STREAM)
    replaced_BT = (uniform_BT < rate) & (tokens != BOS) & (tokens != PAD)
    given = rate if kind == "number" else torch.tensor(rate, dtype=getattr(torch, kind))
    chosen = words(tokens, ids, rate=given)
    assert torch.equal(chosen, tokens.masked_fill(replaced_BT, UNK))
    share = (chosen != tokens).double().mean().item()
    assert share == pytest.approx(0.97 * rate, abs=4.5 * (rate * (1 - rate) / tokens.numel()) ** 0.5 + 0.02 * rate)


def test_rates_zero_and_one_and_kept_words():
    tokens, ids = torch.randint(0, 100, (40, 30)), torch.arange(40)
    tokens[:, ::7] = BOS
    assert torch.equal(words(tokens, ids, rate=0.0), tokens)
    assert torch.equal(words(tokens, ids, rate=torch.tensor(0.0)), tokens)
    kept = (tokens == BOS) | (tokens == PAD)
    assert torch.equal(words(tokens, ids, rate=1.0), torch.where(kept, tokens, UNK))
    assert torch.equal(words(tokens, ids, rate=1.0, keep_ids=()), torch.full_like(tokens, UNK))
    many = tuple(range(0, 100, 2))
    assert torch.equal(words(tokens, ids, rate=1.0, keep_ids=many), torch.where(tokens % 2 == 0, tokens, UNK))


def test_a_number_equal_to_the_rate_replaces_nothing():
    ids, position = torch.arange(3), torch.arange(4)
    uniform_BT = philox_uniform(RNG, ids[:, None], position, stream=STREAM)
    tokens = torch.full((3, 4), 9)
    for rate in (uniform_BT[1, 2], float(uniform_BT[1, 2])):
        assert torch.equal(words(tokens, ids, rate=rate) == UNK, uniform_BT < uniform_BT[1, 2])


def test_noise_ignores_the_order_of_the_batch_and_the_padding():
    tokens, ids = torch.randint(0, 100, (17, 9)), torch.arange(17) * 3 - 20
    whole = words(tokens, ids)
    order = torch.randperm(17)
    assert torch.equal(words(tokens[order], ids[order]), whole[order])
    assert torch.equal(words(tokens[4:6, :3], ids[4:6]), whole[4:6, :3])
    wider = words(F.pad(tokens, (0, 8), value=PAD), ids)
    assert torch.equal(wider[:, :9], whole) and (wider[:, 9:] == PAD).all()


def test_every_part_of_the_key_matters():
    tokens, ids = torch.full((64, 64), 9), torch.arange(64)
    base = words(tokens, ids)
    others = [
        words(tokens, ids, rng=torch.tensor([1235, 7])),
        words(tokens, ids, rng=torch.tensor([1234, 8])),
        words(tokens, ids, stream=2),
        words(tokens, ids + 2**32),
        words(tokens, ids + 64),
    ]
    for other in others:
        # Independent masks at rate 0.4 differ in 0.48 of their places.
        assert (other != base).double().mean().item() == pytest.approx(0.48, abs=0.04)


def test_gradients_repeat_bit_for_bit_on_any_number_of_threads():
    tokens, weight, ids, grad = make(64, 70, 40, 33, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            ours = embedding_word_dropout(tokens, weight, RNG, ids, rate=0.4, **OPTIONS)
            results.append(torch.autograd.grad(ours, weight, grad)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_are_summed_wide_and_rounded_once(dtype):
    tokens, weight, ids, grad = make(64, 70, 5, 8, dtype=dtype)
    grad = grad.abs()
    ours = embedding_word_dropout(tokens, weight, RNG, ids, rate=0.4, **OPTIONS)
    assert ours.dtype == dtype and torch.equal(ours.double(), expected_output(tokens, weight.double(), ids))
    (actual,) = torch.autograd.grad(ours, weight, grad)
    wide = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(expected_output(tokens, wide, ids), wide, grad.double())
    # A hundredth of a unit for the sum in float32, half a unit for the one rounding.
    ulp = torch.finfo(dtype).eps * wanted.abs()
    assert ((actual.double() - wanted).abs() <= 0.51 * ulp).all()
    naive = torch.zeros_like(weight)
    for word, row in zip(words(tokens, ids).flatten().tolist(), grad.flatten(0, 1), strict=True):
        naive[word] += row
    assert (actual.double() - wanted).abs().max() < 0.1 * (naive.double() - wanted).abs().max()


def test_nothing_uninitialised_is_read_or_left():
    assert torch.utils.deterministic.fill_uninitialized_memory
    tokens, weight, ids, grad = make(v=40, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        ours = embedding_word_dropout(tokens, weight, RNG, ids, rate=0.4, **OPTIONS)
        (actual,) = torch.autograd.grad(ours, weight, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    absent = torch.bincount(words(tokens, ids).flatten(), minlength=40) == 0
    assert absent.any() and (actual[absent] == 0).all() and torch.isfinite(actual).all()
    assert torch.isfinite(ours).all()


def test_strided_and_expanded_inputs():
    tokens, weight, ids, _ = make()
    rng = torch.stack((RNG, RNG + 1), 1)[:, 0]
    wide = torch.randn(13, 22, dtype=torch.float64, requires_grad=True)
    strided = embedding_word_dropout(tokens.t().contiguous().t(), wide[:, ::2], rng, ids, rate=0.4, **OPTIONS)
    wanted = expected_output(tokens, wide[:, ::2], ids)
    assert torch.equal(strided, wanted)
    for scalarise in (torch.sum, lambda y: (y.transpose(0, 2) * torch.arange(5.0)).sum()):
        actual = torch.autograd.grad(scalarise(strided), wide, retain_graph=True)[0]
        torch.testing.assert_close(actual, torch.autograd.grad(scalarise(wanted), wide, retain_graph=True)[0])
    one = embedding_word_dropout(tokens[:1].expand(5, 9), weight, RNG, ids[:1].expand(5), rate=0.4, **OPTIONS)
    assert torch.equal(one, expected_output(tokens[:1], weight, ids[:1]).expand(5, 9, 11))


@pytest.mark.parametrize("b, t, e", [(0, 9, 11), (5, 0, 11), (0, 0, 11), (5, 9, 0)])
def test_nothing_to_embed(b, t, e):
    weight = torch.randn(13, e, requires_grad=True)
    tokens = torch.zeros(b, t, dtype=torch.int64)
    ours = embedding_word_dropout(tokens, weight, RNG, torch.arange(b), rate=0.4, **OPTIONS)
    assert ours.shape == (b, t, e)
    (grad,) = torch.autograd.grad(ours.sum(), weight)
    assert grad.shape == weight.shape and (grad == 0).all()


def test_the_mask_is_not_kept():
    tokens, weight, ids, _ = make()
    rate, kept = torch.tensor(0.4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        embedding_word_dropout(tokens, weight, RNG, ids, rate=rate, **OPTIONS)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (tokens, RNG, ids, rate)}


def test_recomputation_draws_the_same_words():
    tokens, weight, ids, grad = make(dtype=torch.float32)

    def twice(w):
        return embedding_word_dropout(tokens, w, RNG, ids, rate=0.4, **OPTIONS) * w.sum()

    plain, again = twice(weight), checkpoint(twice, weight, use_reentrant=False, preserve_rng_state=False)
    assert torch.equal(plain, again)
    assert torch.equal(*(torch.autograd.grad(y, weight, grad)[0] for y in (plain, again)))


def test_registration():
    tokens, weight, ids, grad = make(dtype=torch.float32)
    noise = (RNG, ids, torch.tensor(0.4), UNK, [PAD, BOS], STREAM)
    torch.library.opcheck(_embed, (tokens, weight, *noise, "auto"))
    torch.library.opcheck(_weight_gradient, (grad, tokens, *noise, 13, "auto"))


def test_compiled_whole_and_the_rate_is_no_constant():
    tokens, weight, ids, grad = make(dtype=torch.float32)

    def run(rate):
        return embedding_word_dropout(tokens, weight, RNG, ids, rate=rate, **OPTIONS).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor(0.4)), run(0.4))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rate in (torch.tensor(0.9), torch.tensor(0.0)):
            ours, wanted = compiled(rate), run(rate)
            assert torch.equal(ours, wanted)
            assert torch.equal(*(torch.autograd.grad(y, weight, grad)[0] for y in (ours, wanted)))


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_no_value_on_a_gpu_is_waited_for(kind):
    # A fake tensor has no value: whatever would copy one to the host raises.
    with FakeTensorMode():
        gpu = {"device": "cuda"}
        rate = torch.zeros((), **gpu) if kind == "tensor" else 0.4
        tokens, rng, ids = (torch.zeros(size, dtype=torch.int64, **gpu) for size in [(5, 9), (2,), (5,)])
        ours = embedding_word_dropout(tokens, torch.zeros(13, 11, **gpu), rng, ids, rate=rate, **OPTIONS)
    assert ours.device.type == "cuda" and ours.shape == (5, 9, 11)


def test_second_derivatives_are_refused():
    tokens, weight, ids, _ = make()
    ours = embedding_word_dropout(tokens, weight, RNG, ids, rate=0.4, **OPTIONS)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ours.square().sum(), weight, create_graph=True)


BAD = [
    ({"tokens": torch.zeros(5, 9)}, TypeError, "tokens must be int64"),
    ({"weight": torch.zeros(13, 11, dtype=torch.int64)}, TypeError, "weight floating point"),
    ({"tokens": torch.zeros(5, dtype=torch.int64)}, ValueError, r"tokens must be \[B, T\]"),
    ({"weight": torch.zeros(13)}, ValueError, r"weight \[V, E\], got \(5, 9\), \(13,\)"),
    ({"sample_id": torch.arange(4)}, ValueError, r"sample_id must have shape \(5,\), got \(4,\)"),
    ({"sample_id": torch.arange(5.0)}, TypeError, "sample_id must be int64"),
    ({"rng": torch.zeros(2)}, TypeError, "rng must be int64"),
    ({"rng": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "rng is on meta and weight on cpu"),
    ({"stream": 256}, ValueError, "stream is 256"),
    ({"rate": 1.5}, ValueError, r"rate is 1.5.*\[0, 1\]"),
    ({"rate": float("nan")}, ValueError, "rate is nan"),
    ({"rate": torch.zeros(1)}, ValueError, r"0-d tensor, got shape \(1,\)"),
    ({"unk_id": 13}, ValueError, r"unk_id is 13; it must be in \[0, 13\)"),
    ({"keep_ids": (0, -1)}, ValueError, "an entry of keep_ids is -1"),
    ({"tokens": torch.full((5, 9), 13)}, IndexError, r"tokens run from 13 to 13; they must be in \[0, 13\)"),
    ({"tokens": torch.full((5, 9), -1)}, IndexError, "tokens run from -1 to -1"),
    ({"backend": "cuda"}, ValueError, "auto, triton, torch"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_arguments_are_refused(change, error, message):
    tokens, weight, ids, _ = make()
    arguments = {"tokens": tokens, "weight": weight, "rng": RNG, "sample_id": ids, "rate": 0.4, **OPTIONS} | change
    with pytest.raises(error, match=message):
        embedding_word_dropout(**arguments)
