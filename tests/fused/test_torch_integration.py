"""linear_cross_entropy inside torch: registered operators, compilers, checkpoints, autocast, threads, tied weights."""

import functools
import itertools
import threading

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from test_linear_cross_entropy import OFFSETS, assert_close, make, upstream
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from vae_kernels import linear_cross_entropy, linear_cross_entropy_ops, linear_cross_entropy_torch, reference

# ignore_index, label_smoothing, z_loss, softcap, logit_scale.
SETTINGS = [[-100.0, 0.0, 0.0, 0.0, 1.0], [-100.0, 0.1, 1e-2, 3.0, 0.7]]
WEIGHT_B = torch.tensor([0.5, 3.0, -1.25, 0.25])
ROW_WEIGHT = WEIGHT_B.repeat_interleave(OFFSETS.diff())
# Bytes of seven rows of 29 float32 logits: part of the 23 rows is kept.
SOME_ROWS = 7 * 29 * 4


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of few rows, the last one ragged."""
    monkeypatch.setattr(linear_cross_entropy_torch, "WORKSPACE_BYTES", 1200)


def plain(*tensors):
    return [None if t is None else t.detach() for t in tensors]


def rows_loss(x, weight, target, b, offsets, g_B):
    return (linear_cross_entropy(x, weight, target, bias=b, cu_seqlens=offsets, reduction="sequence") * g_B).sum()


def weighted_loss(x, weight, target, b, offsets, g_B):
    total, nll_B = linear_cross_entropy(x, weight, target, bias=b, cu_seqlens=offsets, weight_per_sequence=g_B)
    return 3.0 * total + nll_B.sum()


LOSSES = pytest.mark.parametrize("loss", [rows_loss, weighted_loss], ids=["rows", "weighted"])


def results(function, inputs, g_B=WEIGHT_B):
    """(loss, gradients of x, weight and bias)."""
    x, weight, target, b = inputs
    value = function(x, weight, target, b, offsets_for(x), g_B)
    return [value, *torch.autograd.grad(value, [t for t in (x, weight, b) if t is not None])]


def offsets_for(x):
    return torch.tensor([0, 4, 4, 9, len(x)])


def assert_equal(actual, wanted):
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


@pytest.mark.parametrize(
    "settings, saved, bias",
    [
        (SETTINGS[0], 2**31, True),
        (SETTINGS[1], 0, False),
        (SETTINGS[1], SOME_ROWS, True),
        (SETTINGS[1], 2**31, False),
    ],
    ids=["plain", "none kept", "some kept", "all kept"],
)
def test_rows_operator_and_its_backward(settings, saved, bias):
    x, weight, target, b = make(dtype=torch.float32, bias=bias)
    opcheck(linear_cross_entropy_ops.rows, (x, weight, b, target, settings, saved, "torch"))
    x, weight, b = plain(x, weight, b)
    _, terms, kept = linear_cross_entropy_ops.rows(x, weight, b, target, settings, saved, "torch")
    assert len(kept) == {0: 0, SOME_ROWS: 7}.get(saved, 23)
    for needs in ([True, True, bias], [False, True, False]):
        arguments = (upstream(23).float(), x, weight, b, target, terms, kept, needs, settings, "torch")
        opcheck(linear_cross_entropy_ops.rows_backward, arguments)


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "options"])
@pytest.mark.parametrize("bias", [False, True])
def test_weighted_operator(bias, settings):
    x, weight, target, b = make(dtype=torch.float32, bias=bias)
    for needs in ([True, True, bias], [True, False, False]):
        tensors = [
            None if t is None else t.detach().requires_grad_(n) for t, n in zip((x, weight, b), needs, strict=True)
        ]
        arguments = (*tensors, target, ROW_WEIGHT, needs, settings, "torch")
        opcheck(linear_cross_entropy_ops.weighted, arguments)


@pytest.mark.parametrize("n", [0, 23])
def test_operators_of_a_transposed_weight(n, small_chunks):
    """What compilers are told of the gradient's layout holds, whatever the weight's own."""
    x, weight, target, b = make(dtype=torch.float32)
    x, weight, b = plain(x[:n], weight.t().contiguous().t(), b)
    _, terms, kept = linear_cross_entropy_ops.rows(x, weight, b, target[:n], SETTINGS[1], SOME_ROWS, "torch")
    g, needs = upstream(23)[:n].float(), [True, True, True]
    arguments = (g, x, weight, b, target[:n], terms, kept, needs, SETTINGS[1], "torch")
    opcheck(linear_cross_entropy_ops.rows_backward, arguments)
    opcheck(linear_cross_entropy_ops.weighted, (x, weight, b, target[:n], g, needs, SETTINGS[1], "torch"))


@pytest.mark.parametrize("dynamic", [None, True])
@LOSSES
def test_compiled_in_one_graph(loss, dynamic):
    """Two sizes, with and without bias: bit for bit what the same function gives uncompiled."""

    def step(x, weight, target, b, offsets, g_B):
        return loss(1.5 * x, weight, target, b, offsets, g_B).square()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, bias in itertools.product((23, 31), (True, False)):
        inputs = make(n=n, dtype=torch.float32, bias=bias)
        assert_equal(results(compiled, inputs), results(step, inputs))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_reduction_compiles(reduction):
    inputs = make(dtype=torch.float32)

    def step(x, weight, target, b, offsets, g_B):
        loss = linear_cross_entropy(x, weight, target, bias=b, reduction=reduction, z_loss=1e-2, softcap=3.0)
        return loss.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_equal(results(compiled, inputs), results(step, inputs))


CHECKPOINTS = {
    "torch": functools.partial(checkpoint, use_reentrant=False),
    "torch, reentrant": functools.partial(checkpoint, use_reentrant=True),
    "deepspeed": deepspeed.checkpointing.checkpoint,
}


@pytest.fixture
def deepspeed_checkpoints(monkeypatch):
    """DeepSpeed's checkpoints, configured without a process group: rank 0 is all it asks one for."""
    if not deepspeed.checkpointing.is_configured():
        monkeypatch.setattr(deepspeed.comm, "get_rank", lambda group=None: 0)
        deepspeed.checkpointing.configure(None)


@pytest.mark.parametrize("name", CHECKPOINTS)
@LOSSES
def test_checkpoints_recompute_the_same(loss, name, deepspeed_checkpoints):
    inputs, forwards, found = make(dtype=torch.float32), [], []
    for run in (CHECKPOINTS[name], lambda layer, x: layer(x)):
        # Reentrant checkpoints work with backward() only.
        x, weight, b = (t.detach().requires_grad_() for t in (inputs[0], inputs[1], inputs[3]))

        def layer(x, weight=weight, b=b):
            forwards.append(1)
            return loss(torch.tanh(x), weight, inputs[2], b, OFFSETS, WEIGHT_B)

        value = run(layer, x)
        value.backward()
        found.append([value, x.grad, weight.grad, b.grad])
    assert_equal(*found)
    assert len(forwards) == 3


@pytest.mark.parametrize("chunk_bytes", [2**27, 300 * 64 * 2], ids=["one chunk", "chunks of 64 rows"])
@pytest.mark.parametrize("weighted", [False, True])
def test_autocast_gradients_of_float32_parameters(weighted, chunk_bytes, monkeypatch):
    """As close to float64 as F.linear's autocast; where chunks are added up, the sum is not rounded to bfloat16."""
    monkeypatch.setattr(linear_cross_entropy_torch, "WORKSPACE_BYTES", chunk_bytes)
    x, weight, target, b = make(512, 64, 300, torch.float32, scale=0.3)
    wide = [t.detach().bfloat16().double().requires_grad_() for t in (x, weight)]
    wide.append(b.detach().double().requires_grad_())
    wanted = torch.autograd.grad(reference.linear_cross_entropy(wide[0], wide[1], target, bias=wide[2]).sum(), wide)
    extra = {"cu_seqlens": torch.tensor([0, 512]), "weight_per_sequence": torch.ones(1)} if weighted else {}
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_cross_entropy(x, weight, target, bias=b, **extra)
        ours = torch.autograd.grad(out[0] if weighted else out.sum(), (x, weight, b))
        logits = F.linear(x, weight, b).float()
        theirs = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), (x, weight, b))
    for o, t, w in zip(ours, theirs, wanted, strict=True):
        assert o.dtype == torch.float32
        assert (o - w).norm() <= 1.01 * (t - w).norm() < 1e-2 * w.norm()
    if chunk_bytes < 2**27:
        for o, t in zip(ours[1:], theirs[1:], strict=True):
            assert torch.equal(t, t.bfloat16().float()) and not torch.equal(o, o.bfloat16().float())


@LOSSES
def test_inference_mode_first_and_training_after(loss, monkeypatch):
    """Memory that is kept between calls must not stay an inference tensor's."""
    monkeypatch.setattr(linear_cross_entropy_torch, "_LOCAL", threading.local())
    inputs = make(dtype=torch.float32)
    with torch.inference_mode():
        scored = loss(*inputs, OFFSETS, WEIGHT_B)
    value, *gradients = results(loss, inputs)
    assert torch.equal(scored, value)
    wide = [t.detach().double().requires_grad_() for t in (inputs[0], inputs[1], inputs[3])]
    wanted = results(loss, (wide[0], wide[1], inputs[2], wide[2]))
    assert_close([value, *gradients], wanted, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(loss(*inputs, OFFSETS, WEIGHT_B), scored)


@LOSSES
def test_threads_do_not_share_memory(loss, small_chunks):
    cases = [make(n=400, h=9, v=v, dtype=torch.float32, seed=v) for v in (29, 31)]
    wanted = [results(loss, inputs) for inputs in cases]
    wrong, start = [], threading.Barrier(2)

    def work(inputs, expected):
        start.wait(20)
        for _ in range(8):
            found = results(loss, inputs)
            if not all(torch.equal(f, e) for f, e in zip(found, expected, strict=True)):
                wrong.append(found)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@LOSSES
def test_tied_weight_gets_the_sum_of_both_gradients(loss):
    _, weight, target, b = make()
    words = torch.randint(0, 29, (23,), generator=torch.Generator().manual_seed(5))

    def tied(embedding, head):
        return loss(torch.tanh(F.embedding(words, embedding)), head, target, b, OFFSETS, WEIGHT_B.double())

    once = torch.autograd.grad(tied(weight, weight), weight)[0]
    pair = [weight.detach().clone().requires_grad_() for _ in range(2)]
    parts = torch.autograd.grad(tied(*pair), pair)
    assert all(part.abs().max() > 0.1 for part in parts)
    torch.testing.assert_close(once, sum(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, -4.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_and_cleared_gradients(weighted, scale):
    """Gradients formed in forward are handed out unscaled; what is done to .grad must not reach what is kept."""
    inputs = make(dtype=torch.float32)
    extra = {"weight_per_sequence": WEIGHT_B} if weighted else {"reduction": "sum"}

    def loss_of(leaf, weight, b, scorer):
        # x is not a leaf, and two ways lead to it.
        x = leaf * 1.0
        return scale * scorer(x, weight, inputs[2], b) + 0.25 * x.square().sum()

    def ours(x, weight, target, b):
        out = linear_cross_entropy(x, weight, target, bias=b, cu_seqlens=OFFSETS, **extra)
        return out[0] if weighted else out

    def plain_rows(x, weight, target, b):
        nll_N = reference.linear_cross_entropy(x, weight, target, bias=b)
        return (nll_N * ROW_WEIGHT).sum() if weighted else nll_N.sum()

    leaves = [t.detach().requires_grad_() for t in (inputs[0], inputs[1], inputs[3])]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    loss = loss_of(*leaves, ours)
    once = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    assert_close(once, torch.autograd.grad(loss_of(*wide, plain_rows), wide), rtol=1e-5, atol=1e-5)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert_equal([leaf.grad for leaf in leaves], [2.0 * g for g in once])
    for leaf in leaves:
        leaf.grad.zero_()
    loss.backward(retain_graph=True)
    assert_equal([leaf.grad for leaf in leaves], once)
    for leaf in leaves:
        leaf.grad.fill_(1e6)
        leaf.grad = None
    loss.backward(retain_graph=True)
    # The first gradient after None is taken over by .grad, and could be the kept one itself.
    for leaf in leaves:
        leaf.grad.zero_()
    loss.backward()
    assert_equal([leaf.grad for leaf in leaves], once)
