"""Noise: published vectors, distribution, and that a number depends on its counter and on nothing else."""

import numpy as np
import pytest
import torch
from scipy import stats

from vae_kernels import philox_normal, philox_uniform
from vae_kernels.philox import normal_words, philox_words, unit_interval, unit_interval_without_zero

RNG = torch.tensor([1234, 7])

# Random123's known-answer file: counter, key, output.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


# The lengths reach both the vectorised body and the scalar tail of torch's loops.
@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_published_vectors(counter, key, expected, length):
    words = [[torch.full((length,), int(word, 16)) for word in text.split()] for text in (counter, key)]
    for word, value in zip(philox_words(tuple(words[0]), tuple(words[1])), expected.split(), strict=True):
        assert torch.equal(word, torch.full((length,), int(value, 16)))


def test_extreme_words_map_into_the_interval():
    word = torch.tensor([0, 1, 2**31, 2**32 - 1])
    half_open, positive = unit_interval(word), unit_interval_without_zero(word)
    assert half_open.tolist() == [0.0, 0.0, 0.5, 1.0 - 2.0**-24]
    assert positive.tolist() == [2.0**-32, 2.0**-32, 0.5, 1.0]


@pytest.mark.long
def test_normals_are_standard_and_independent():
    noise_KBD = philox_normal(RNG, torch.arange(500), 64, num_samples=4, stream=0).double()
    flat = noise_KBD.flatten()
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-3
    n = flat.numel()
    moments = [flat.mean(), flat.var() - 1.0, flat.pow(3).mean(), flat.pow(4).mean() - 3.0]
    spread = [1.0, 2.0, 15.0, 96.0]
    assert all(abs(float(m)) < 4.5 * (v / n) ** 0.5 for m, v in zip(moments, spread, strict=True))
    assert flat.abs().max() > 4.0
    # The pair shares its words, and neighbouring rows and samples share all but one counter word.
    for a, b in [
        (noise_KBD[..., 0::2], noise_KBD[..., 1::2]),
        (noise_KBD[:, 1:], noise_KBD[:, :-1]),
        (noise_KBD[1:], noise_KBD[:-1]),
    ]:
        product = a * b
        assert abs(float(product.mean())) < 4.5 * product.numel() ** -0.5


def test_uniforms_are_uniform():
    draws = philox_uniform(RNG, torch.arange(300)[:, None], torch.arange(200), stream=1)
    assert draws.dtype == torch.float32 and draws.min() >= 0.0 and draws.max() < 1.0
    assert stats.kstest(draws.double().flatten().numpy(), "uniform").pvalue > 1e-3


def test_noise_of_a_row_ignores_the_rest_of_the_batch():
    ids = torch.randperm(77)
    whole = philox_normal(RNG, ids, 33, num_samples=3, stream=2)
    for rows in (slice(0, 1), slice(5, 9), slice(40, 77)):
        assert torch.equal(philox_normal(RNG, ids[rows], 33, num_samples=3, stream=2), whole[:, rows])
    assert torch.equal(philox_normal(RNG, ids, 33, num_samples=1, stream=2), whole[:1])
    assert torch.equal(philox_normal(RNG, ids, 9, num_samples=3, stream=2), whole[..., :9])


def test_every_part_of_the_counter_and_key_matters():
    ids = torch.tensor([5, 5 + 2**32, 6])
    base = philox_normal(RNG, ids, 8, num_samples=2, stream=0)
    variants = [
        philox_normal(torch.tensor([1235, 7]), ids, 8, num_samples=2, stream=0),
        philox_normal(torch.tensor([1234, 8]), ids, 8, num_samples=2, stream=0),
        philox_normal(RNG, ids, 8, num_samples=2, stream=1),
        philox_normal(RNG, ids.flip(0), 8, num_samples=2, stream=0)[:, [0, 2, 1]],
        base.flip(0),
    ]
    assert all((base != other).all() for other in variants)
    # A high half that was dropped would make the first two ids one.
    assert (base[:, 0] != base[:, 1]).all()


def test_uniform_counter_layout():
    ids, position = torch.tensor([3, 2**40 + 1, -2]), torch.tensor([0, 9, 2**31])
    key = (RNG[0], RNG[1])
    counter = (position, ids & 0xFFFFFFFF, (ids >> 32) & 0xFFFFFFFF, torch.tensor(5 << 24))
    expected = (philox_words(counter, key)[0] >> 8).numpy().astype(np.float64) / 2**24
    np.testing.assert_array_equal(philox_uniform(RNG, ids, position, stream=5).double().numpy(), expected)


def test_normals_are_box_muller_of_the_words():
    ids = torch.arange(40)
    word_0, word_1 = (w.numpy() for w in normal_words(RNG, ids, 6, num_samples=2, stream=3))
    radius = np.sqrt(-2.0 * np.log(np.float32(word_0 | 1).astype(np.float64) / 2**32))
    angle = 2.0 * np.pi * (word_1 >> 8) / 2**24
    noise = philox_normal(RNG, ids, 6, num_samples=2, stream=3).double().numpy()
    # Half a unit in the last place of float32: any arithmetic below float64 would show.
    np.testing.assert_allclose(noise[..., 0::2], radius * np.cos(angle), rtol=2.0**-24 * 1.0001)
    np.testing.assert_allclose(noise[..., 1::2], radius * np.sin(angle), rtol=2.0**-24 * 1.0001)


def test_bad_arguments_are_refused():
    ids = torch.arange(2)
    with pytest.raises(TypeError, match="rng must be int64"):
        philox_uniform(torch.zeros(2), ids, ids, stream=0)
    with pytest.raises(TypeError, match="sample_id must be int64"):
        philox_uniform(RNG, ids.int(), ids, stream=0)
    with pytest.raises(ValueError, match="stream is 256"):
        philox_uniform(RNG, ids, ids, stream=256)
