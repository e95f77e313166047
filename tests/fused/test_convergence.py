"""A tiny text VAE trained with the kernels and with plain torch: the same curves, step by step.

Shapes: B sequences, N words packed over them, V vocabulary, E embedding, H hidden, D latent dimensions.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vae_kernels import gaussian_rsample_kl, linear_cross_entropy, philox_normal, reference

B, V, E, H, D, STEPS, FREE_BITS = 48, 40, 12, 24, 5, 60, 0.02
IDS = torch.arange(B)


class TinyVae(nn.Module):
    """Encoder: the mean of the words' embeddings. Decoder: a layer of the latent and the word before."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, E)
        self.posterior = nn.Linear(E, 2 * D)
        self.from_latent, self.from_word = nn.Linear(D, H), nn.Linear(E, H)
        self.output = nn.Linear(H, V)

    def encode(self, words_N, sequence_N, lengths_B):
        sums_BE = torch.zeros(B, E).index_add(0, sequence_N, self.embedding(words_N))
        mu_BD, logvar_BD = self.posterior(sums_BE / lengths_B[:, None]).chunk(2, dim=-1)
        return mu_BD, logvar_BD - 1.0

    def decode(self, words_N, sequence_N, first_N, z_BD):
        before_NE = self.embedding(words_N.roll(1)).masked_fill(first_N[:, None], 0.0)
        return torch.tanh(self.from_latent(z_BD).index_select(0, sequence_N) + self.from_word(before_NE))


def corpus():
    """(words [N], offsets [B + 1]): four topics of ten words, one word in eight of any topic."""
    generator = torch.Generator().manual_seed(4)
    lengths_B = torch.randint(3, 10, (B,), generator=generator)
    offsets_B1 = F.pad(lengths_B.cumsum(0), (1, 0))
    n = int(offsets_B1[-1])
    topic_N = (IDS % 4).repeat_interleave(lengths_B)
    own_N = 10 * topic_N + torch.randint(10, (n,), generator=generator)
    any_N = torch.randint(V, (n,), generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.125, any_N, own_N), offsets_B1


def with_rows(hidden_NH, output, words_N, offsets_B1):
    nll_B = linear_cross_entropy(
        hidden_NH, output.weight, words_N, bias=output.bias, cu_seqlens=offsets_B1, reduction="sequence"
    )
    return nll_B.sum()


def with_known_weights(hidden_NH, output, words_N, offsets_B1):
    return linear_cross_entropy(
        hidden_NH,
        output.weight,
        words_N,
        bias=output.bias,
        cu_seqlens=offsets_B1,
        weight_per_sequence=torch.ones(B),
    )[0]


def with_torch(hidden_NH, output, words_N, offsets_B1):
    return reference.linear_cross_entropy(hidden_NH, output.weight, words_N, bias=output.bias).sum()


def train(reconstruct, narrow=False):
    """(ELBO in nats per sequence of each step [S], KL of each dimension [S, D], last weights)."""
    words_N, offsets_B1 = corpus()
    lengths_B = offsets_B1.diff()
    sequence_N = IDS.repeat_interleave(lengths_B)
    first_N = torch.zeros(len(words_N), dtype=torch.bool).index_fill(0, offsets_B1[:-1], True)
    torch.manual_seed(8)
    vae = TinyVae()
    # Epsilon keeps Adam from blowing rounding up where a gradient is almost zero.
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.03, eps=1e-4)
    elbos, kls = [], []
    for step in range(STEPS):
        rng = torch.tensor([21, step])
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            mu_BD, logvar_BD = vae.encode(words_N, sequence_N, lengths_B)
            if reconstruct is with_torch:
                noise_KBD = philox_normal(rng, IDS, D, num_samples=1, stream=0)
                z_KBD, kl_B, kl_free_B, kl_D, _, _ = reference.gaussian_rsample_kl(
                    mu_BD, logvar_BD, noise_KBD, IDS, free_bits=FREE_BITS
                )
            else:
                latent = gaussian_rsample_kl(mu_BD, logvar_BD, rng, IDS, free_bits=FREE_BITS)
                z_KBD, kl_B, kl_free_B, kl_D = latent.z, latent.kl, latent.kl_free, latent.kl_per_dim
            hidden_NH = vae.decode(words_N, sequence_N, first_N, z_KBD[0])
            rec = reconstruct(hidden_NH, vae.output, words_N, offsets_B1)
        loss = (rec + 0.5 * kl_free_B.sum()) / B
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        elbos.append(-float((rec + kl_B.sum()).detach()) / B)
        kls.append(kl_D.detach().float() / B)
    return torch.tensor(elbos), torch.stack(kls), [p.detach() for p in vae.parameters()]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Work this small only waits for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain(one_thread):
    return train(with_torch)


def test_plain_torch_learns_and_uses_its_latent(plain):
    elbos, kls, _ = plain
    assert elbos[-5:].mean() > elbos[:5].mean() + 3.0
    assert kls[-1].sum() > 0.5 and kls[-1].max() > 3 * kls[0].max()


@pytest.mark.parametrize("reconstruct", [with_rows, with_known_weights], ids=["rows", "weighted"])
def test_kernels_train_as_plain_torch_does(reconstruct, plain):
    elbos, kls, weights = train(reconstruct)
    torch.testing.assert_close(elbos, plain[0], rtol=1e-4, atol=0.0)
    for found, wanted in zip(kls, plain[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))
    for found, wanted in zip(weights, plain[2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reconstruct", [with_rows, with_known_weights], ids=["rows", "weighted"])
def test_bfloat16_ends_where_float32_does(reconstruct, plain):
    elbos, kls, _ = train(reconstruct, narrow=True)
    assert float(elbos[-5:].mean()) == pytest.approx(float(plain[0][-5:].mean()), rel=5e-3)
    assert float(elbos[-1]) == pytest.approx(float(plain[0][-1]), rel=5e-3)
    torch.testing.assert_close(kls[-1], plain[1][-1], rtol=0.05, atol=0.05 * float(plain[1][-1].max()))
