"""gaussian_rsample_kl, torch backend: closed forms, torch.distributions, autograd of the reference."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vae_kernels import gaussian_rsample_kl, philox_normal, reference

RNG = torch.tensor([99, 3])
B, D = 6, 5
OUTPUTS = ("z", "kl", "kl_free", "log_q", "log_p")


def make_inputs(prior="none", dtype=torch.float64, rows=B, dim=D, seed=0):
    """(mu, logvar, prior_mu, prior_logvar, sample_id); row 2 is padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (0.7 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    shape = {"none": None, "shared": (dim,), "rows": (rows, dim)}[prior]
    priors = (None, None) if shape is None else (draw(*shape), draw(*shape))
    sample_id = torch.arange(rows) * 1000 + 2**33
    sample_id[2 % rows] = -1 if rows > 2 else sample_id[2 % rows]
    return draw(rows, dim), draw(rows, dim), *priors, sample_id


def run(inputs, backend="torch", **options):
    mu, logvar, prior_mu, prior_logvar, sample_id = inputs
    return gaussian_rsample_kl(
        mu, logvar, RNG, sample_id, prior_mu=prior_mu, prior_logvar=prior_logvar, backend=backend, **options
    )


def run_reference(inputs, free_bits=0.0, num_samples=1, stream=0):
    mu, logvar, prior_mu, prior_logvar, sample_id = inputs
    noise = philox_normal(RNG, sample_id, mu.shape[1], num_samples=num_samples, stream=stream).double()
    return dict(
        zip(
            ("z", "kl", "kl_free", "kl_per_dim", "log_q", "log_p"),
            reference.gaussian_rsample_kl(
                mu,
                logvar,
                noise,
                sample_id,
                free_bits=free_bits,
                prior_mu=prior_mu,
                prior_logvar=prior_logvar,
            ),
            strict=True,
        )
    )


def scalarise(outputs, names, seed=1):
    """A scalar with its own random (also negative and zero) upstream gradient for each output element."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for name in names:
        upstream = torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64)
        upstream.view(-1)[0] = 0.0
        total = total + (outputs[name].double() * upstream).sum()
    return total


@pytest.mark.parametrize("prior", ["none", "shared", "rows"])
@pytest.mark.parametrize("num_samples, free_bits", [(1, 0.0), (3, 0.25)])
@pytest.mark.parametrize("names", [OUTPUTS, *[(name,) for name in OUTPUTS]])
def test_values_and_gradients(prior, num_samples, free_bits, names):
    inputs = make_inputs(prior)
    ours = run(inputs, num_samples=num_samples, free_bits=free_bits)._asdict()
    expected = run_reference(inputs, free_bits, num_samples)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12)
    parameters = [p for p in inputs[:4] if p is not None]
    actual = torch.autograd.grad(scalarise(ours, names), parameters, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(scalarise(expected, names), parameters, allow_unused=True, materialize_grads=True)
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-11, atol=1e-11)


def test_float32_against_float64():
    inputs = make_inputs("shared", rows=33, dim=17)
    narrow = tuple(p.detach().float().requires_grad_() if p.is_floating_point() else p for p in inputs)
    wide = tuple(p.detach().double().requires_grad_() if p.is_floating_point() else p for p in narrow)
    ours = run(narrow, num_samples=2, free_bits=0.1)._asdict()
    expected = run_reference(wide, 0.1, 2)
    for name, value in expected.items():
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name].double(), value, rtol=2e-6, atol=1e-5)
    actual = torch.autograd.grad(scalarise(ours, OUTPUTS), narrow[:4])
    wanted = torch.autograd.grad(scalarise(expected, OUTPUTS), wide[:4])
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.double(), w, rtol=1e-5, atol=3e-5)


def test_bfloat16_inputs_are_widened_before_any_arithmetic():
    inputs = make_inputs(dtype=torch.bfloat16)
    ours = run(inputs)
    wide = run(tuple(None if p is None else p.detach().float() if p.is_floating_point() else p for p in inputs))
    assert ours.z.dtype == torch.bfloat16 and torch.equal(ours.z, wide.z.bfloat16())
    assert torch.equal(ours.kl, wide.kl) and torch.equal(ours.log_p, wide.log_p)
    ours.kl.sum().backward()
    torch.testing.assert_close(inputs[0].grad.float()[0], inputs[0].detach()[0].float())


def test_kl_and_densities_against_torch_distributions():
    mu, logvar, prior_mu, prior_logvar, _ = inputs = make_inputs("rows")
    ours = run((*inputs[:4], torch.arange(B)), num_samples=4)
    q, p = Normal(mu, torch.exp(logvar / 2)), Normal(prior_mu, torch.exp(prior_logvar / 2))
    torch.testing.assert_close(ours.kl, kl_divergence(q, p).sum(-1))
    torch.testing.assert_close(ours.kl_per_dim, kl_divergence(q, p).sum(0))
    torch.testing.assert_close(ours.log_q, q.log_prob(ours.z).sum(-1))
    torch.testing.assert_close(ours.log_p, p.log_prob(ours.z).sum(-1))


def test_kl_agrees_with_its_monte_carlo_estimate():
    mu, logvar = torch.tensor([[0.8, -0.3, 0.1]]), torch.tensor([[-1.0, 0.2, 0.0]])
    sample = gaussian_rsample_kl(mu, logvar, RNG, torch.tensor([4]), num_samples=20000)
    ratio = (sample.log_q - sample.log_p)[:, 0].double()
    assert abs(float(ratio.mean() - sample.kl[0])) < 4.5 * float(ratio.std()) / 20000**0.5
    spread = (sample.z[:, 0] - mu[0]) / torch.exp(logvar[0] / 2)
    assert (spread.mean(0).abs() < 4.5 / 20000**0.5).all()


def test_nearly_collapsed_kl_keeps_its_digits():
    logvar = torch.full((1, 1), 1e-3)
    kl = float(gaussian_rsample_kl(torch.zeros(1, 1), logvar, RNG, torch.tensor([0])).kl)
    exact = float(0.5 * (torch.expm1(logvar.double()) - logvar.double()))
    assert abs(kl - exact) < 1e-3 * exact


@pytest.mark.parametrize("prior", ["none", "rows"])
def test_padding_rows_are_zero_whatever_they_hold(prior):
    inputs = make_inputs(prior)
    with torch.no_grad():
        for parameter in inputs[:4]:
            if parameter is not None:
                parameter[2] = float("nan")
    sample = run(inputs, num_samples=2, free_bits=0.5)
    for name, value in sample._asdict().items():
        assert torch.isfinite(value).all(), name
    assert (sample.z[:, 2] == 0).all() and sample.kl[2] == 0 and sample.kl_free[2] == 0
    assert (sample.log_q[:, 2] == 0).all() and (sample.log_p[:, 2] == 0).all()
    scalarise(sample._asdict(), OUTPUTS).backward()
    for parameter in inputs[:4]:
        if parameter is not None:
            assert (parameter.grad[2] == 0).all() and (parameter.grad[0] != 0).all()
            assert torch.isfinite(parameter.grad).all()


def test_free_bits_flatten_only_what_lies_below():
    mu = torch.tensor([[0.1, 2.0]], requires_grad=True)
    sample = gaussian_rsample_kl(mu, torch.zeros(1, 2), RNG, torch.tensor([0]), free_bits=torch.tensor(0.5))
    assert sample.kl_free.item() == pytest.approx(0.5 + 2.0)
    assert sample.kl.item() == pytest.approx(0.005 + 2.0)
    sample.kl_free.sum().backward()
    assert mu.grad.tolist() == [[0.0, 2.0]]


def test_a_row_does_not_depend_on_the_batch():
    inputs = make_inputs(rows=9)
    whole = run(inputs, num_samples=2)
    part = run((inputs[0][4:7], inputs[1][4:7], None, None, inputs[4][4:7]), num_samples=2)
    assert torch.equal(part.z, whole.z[:, 4:7]) and torch.equal(part.kl, whole.kl[4:7])


def test_repeats_bit_for_bit_and_retain_graph():
    inputs = make_inputs(dtype=torch.float32)
    sample = run(inputs, num_samples=2)
    loss = scalarise(sample._asdict(), OUTPUTS)
    first = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    second = torch.autograd.grad(loss, inputs[:2])
    again = torch.autograd.grad(scalarise(run(inputs, num_samples=2)._asdict(), OUTPUTS), inputs[:2])
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_gradcheck_and_strided_inputs():
    mu, logvar, *_, sample_id = make_inputs(rows=3, dim=3)

    def operation(a, b):
        sample = gaussian_rsample_kl(a.t(), b.t(), RNG, sample_id, num_samples=2)
        return sample.z, sample.kl, sample.log_q, sample.log_p

    assert torch.autograd.gradcheck(operation, (mu, logvar))


def test_second_derivatives_and_kl_per_dim_gradients_are_refused():
    inputs = make_inputs()
    sample = run(inputs)
    assert not sample.kl_per_dim.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sample.kl.sum(), inputs[0], create_graph=True)


def test_empty_batch():
    sample = gaussian_rsample_kl(torch.zeros(0, 4), torch.zeros(0, 4), RNG, torch.zeros(0, dtype=torch.int64))
    assert sample.z.shape == (1, 0, 4) and sample.kl_per_dim.tolist() == [0.0] * 4


def test_bad_arguments_are_refused():
    zero, ids = torch.zeros(2, 3), torch.arange(2)
    with pytest.raises(ValueError, match="alike"):
        gaussian_rsample_kl(zero, zero[:1], RNG, ids)
    with pytest.raises(TypeError, match="one floating dtype"):
        gaussian_rsample_kl(zero, zero.double(), RNG, ids)
    with pytest.raises(ValueError, match="sample_id"):
        gaussian_rsample_kl(zero, zero, RNG, torch.arange(3))
    with pytest.raises(ValueError, match="num_samples is 0"):
        gaussian_rsample_kl(zero, zero, RNG, ids, num_samples=0)
    with pytest.raises(ValueError, match="prior_mu"):
        gaussian_rsample_kl(zero, zero, RNG, ids, prior_mu=torch.zeros(2))
    with pytest.raises(ValueError, match="free_bits"):
        gaussian_rsample_kl(zero, zero, RNG, ids, free_bits=torch.zeros(3))


@pytest.mark.parametrize("prior", ["none", "shared", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_and_one_graph(prior, dtype):
    inputs = make_inputs(prior, dtype=dtype)
    mu, logvar, prior_mu, prior_logvar, sample_id = inputs
    arguments = (mu, logvar, prior_mu, prior_logvar, RNG, sample_id, torch.tensor(0.2), 2, 1, "torch")
    torch.library.opcheck(torch.ops.vae_kernels.gaussian_rsample_kl.default, arguments)

    def loss(*parameters):
        z, kl, kl_free, _, log_q, log_p = run((*parameters, sample_id), num_samples=2, free_bits=0.2)
        return z.float().pow(3).sum() - 2.0 * kl[0] + kl_free.square().sum() + (log_q * log_p).sum()

    leaves = [p for p in inputs[:4] if p is not None]
    eager = torch.autograd.grad(loss(*inputs[:4]), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(*inputs[:4]), leaves)
    assert all(torch.equal(e, t) for e, t in zip(eager, traced, strict=True))
