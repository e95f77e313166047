"""Decoding: the right tokens with the right probabilities, the same alone or in company."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vae_dist.config.model_schema import LstmConfig, ModelConfig, TransformerConfig
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import collate
from vae_dist.data.text.special_ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from vae_dist.data.text.tokenizer import build_tokenizer
from vae_dist.decode.encode import score
from vae_dist.decode.engine import TOKEN_STREAM, generate
from vae_dist.decode.latent_ops import TextModel
from vae_dist.decode.prior import prior_latents
from vae_dist.decode.request import Decoding, Generated
from vae_dist.errors import DataError
from vae_dist.model.vae import TextVAE
from vae_kernels import philox_uniform

WORDS = [f"w{i:02d}" for i in range(30)]
GREEDY = Decoding(temperature=0.0, max_tokens=12)


class FixedLogits:
    """A decoder whose logits at each position are given; the latent does not matter. `seen` is what one row was fed."""

    per_token, latent_dim, first_position = False, 1, 0

    def __init__(self, *logits: list[float]) -> None:
        self.table = torch.tensor(logits)
        self.output_bias, self.vocab_size = self.table[0], len(logits[0])
        self.seen: list[int] = []
        self.decoder = self

    def new_state(self, rows: int, max_tokens: int) -> list[torch.Tensor]:
        return []

    def step(
        self, tokens_B: torch.Tensor, z_BD: torch.Tensor, state: list[torch.Tensor], position_B: torch.Tensor, span: int
    ) -> torch.Tensor:
        self.seen.append(int(tokens_B[0]))
        return self.table[position_B.clamp(max=len(self.table) - 1)]


def standard(latent_dim: int) -> TextVAE:
    """A VAE with a standard normal prior."""
    part = LstmConfig(hidden_dim=4)
    return TextVAE(ModelConfig(embedding_dim=4, encoder=part, decoder=part, latent_dim=latent_dim), 8).eval()


def draws(logits: list[float], count: int, **options: Any) -> np.ndarray:
    """First tokens of `count` rows with the seeds 0, 1, ..."""
    rows = generate(FixedLogits(logits), torch.zeros(count, 1), range(count), Decoding(max_tokens=1, **options))  # type: ignore[arg-type]
    return np.array([row.tokens[0] for row in rows])


def slow_distribution(
    logits: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, allow_unknown: bool = False
) -> dict[int, float]:
    """Token to probability, likeliest first, by the words of `Decoding`."""
    banned = {PAD_ID, BOS_ID} | (set() if allow_unknown else {UNK_ID})
    weights = {i: math.exp(v / temperature) for i, v in enumerate(logits) if i not in banned}
    total = sum(weights.values())
    # Ranks are those of the float32 quotients: two weights can be equal where their logits are not.
    ranked = sorted(weights, key=lambda i: (-np.float32(logits[i]) / np.float32(temperature), i))
    kept, mass = [], 0.0
    for token in ranked[: top_k or None]:
        if kept and mass >= top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    return {token: weights[token] / total / mass for token in kept}


LOGITS = [9.0, 8.0, 0.3, 7.0, 1.2, -0.5, 2.0, 0.9, 2.0, -3.0]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 3}, {"top_k": 99}, {"top_p": 0.6},
        {"top_p": 0.9, "temperature": 1.7}, {"top_p": 0.0}, {"top_k": 4, "top_p": 0.7}, {"allow_unknown": True},
    ],
    ids=str,
)  # fmt: skip
def test_tokens_follow_the_distribution_by_inverse_cdf(options: dict[str, Any]) -> None:
    count, distribution = 4000, slow_distribution(LOGITS, **options)
    tokens = draws(LOGITS, count, **options)
    assert set(tokens) <= set(distribution)
    # Exactly: the token at each row's own uniform number, except within rounding of a border.
    uniform = philox_uniform(
        torch.zeros(2, dtype=torch.int64), torch.arange(count), torch.tensor(0), stream=TOKEN_STREAM
    )
    in_order = sorted(distribution)
    borders = np.cumsum([distribution[token] for token in in_order])
    expected = np.array(in_order)[np.searchsorted(borders[:-1], uniform.numpy(), side="right")]
    clear = np.abs(uniform.numpy()[:, None] - borders).min(axis=1) > 1e-5
    assert np.array_equal(tokens[clear], expected[clear])
    if len(distribution) > 1:
        observed = [int((tokens == token).sum()) for token in distribution]
        wanted = [count * p for p in distribution.values()]
        enough = [i for i, w in enumerate(wanted) if w >= 5]
        rest = [[sum(c) - sum(c[i] for i in enough)] for c in (observed, wanted)]
        table = [
            [c[i] for i in enough] + (r if rest[1][0] > 1 else [])
            for c, r in zip((observed, wanted), rest, strict=True)
        ]
        statistic = sum((o - w) ** 2 / w for o, w in zip(*table, strict=True))
        assert statistic < stats.chi2.isf(1e-6, len(table[0]) - 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=12),
    st.floats(0.05, 5.0),
    st.integers(0, 6),
    st.floats(0.0, 1.0),
)
def test_no_setting_lets_a_banned_or_truncated_token_through(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    allowed = slow_distribution(logits, temperature, top_k, 1.0)
    assert set(draws(logits, 40, temperature=temperature, top_k=top_k, top_p=top_p)) <= set(allowed)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-7, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert set(draws([0.0, 0.0, 0.1, 5.0, 30.0, -80.0], 50, temperature=temperature)) == {4}


def test_extreme_logits_do_not_break_sampling() -> None:
    assert set(draws([0.0, 0.0, -1e30, 0.0, 1e30, -1e30], 20)) == {4}


def test_the_log_probability_is_the_models_own_not_the_samplers() -> None:
    first, second = [5.0, 1.0, 0.5, 2.0, 1.0, 0.1], [0.0, 1.0, 3.0, 2.0, 1.0, 0.1]
    rows = generate(FixedLogits(first, second), torch.zeros(30, 1), range(30), Decoding(0.7, 3, 0.8, max_tokens=3))  # type: ignore[arg-type]
    log_p = torch.log_softmax(torch.tensor([first, second, second]), -1)
    for row in rows:
        assert row.log_prob == pytest.approx(sum(float(log_p[i, t]) for i, t in enumerate(row.tokens)), abs=1e-5)
    assert {len(row.tokens) for row in rows} >= {1, 2}


def test_finish_reasons_and_what_is_fed_back() -> None:
    no_end, then_end = [0.0, 0.0, -50.0, 0.0, 9.0, 1.0], [0.0, 0.0, 50.0, 0.0, 9.0, 1.0]
    model = FixedLogits(no_end, no_end, then_end)
    (row,) = generate(model, torch.zeros(1, 1), [0], Decoding(temperature=0.0, max_tokens=9))  # type: ignore[arg-type]
    assert (row.tokens, row.finished) == ([4, 4, EOS_ID], True)
    # Before that the engine has tried its shapes.
    assert model.seen[-3:] == [BOS_ID, 4, 4]
    for limit in (0, 1, 2):
        (cut,) = generate(model, torch.zeros(1, 1), [0], Decoding(temperature=0.0, max_tokens=limit))  # type: ignore[arg-type]
        assert (cut.tokens, cut.finished) == ([4] * limit, False)
    (last,) = generate(model, torch.zeros(1, 1), [0], Decoding(temperature=0.0, max_tokens=3))  # type: ignore[arg-type]
    assert last.finished


def test_a_finished_row_stays_finished_while_others_go_on() -> None:
    mixed = [0.0, 0.0, 0.5, 0.0, 0.5, 0.5]
    rows = generate(FixedLogits(mixed), torch.zeros(40, 1), range(40), Decoding(max_tokens=20))  # type: ignore[arg-type]
    assert len({len(row.tokens) for row in rows}) > 3
    for row in rows:
        assert EOS_ID not in row.tokens[:-1]
        assert row.finished == (row.tokens[-1] == EOS_ID)


def text_model(decoder: str = "lstm", injection: str = "both", seed: int = 0) -> TextModel:
    tokenizer = build_tokenizer([" ".join(WORDS)], PrepareConfig(tokenizer="word", vocab_size=64))
    parts = {
        "lstm": LstmConfig(hidden_dim=16),
        "transformer": TransformerConfig(hidden_dim=16, num_layers=2, num_heads=2),
    }
    config = ModelConfig(
        embedding_dim=12, latent_dim=6, dropout=0.2, injection=injection, encoder=parts["lstm"], decoder=parts[decoder]
    )
    torch.manual_seed(seed)
    vae = TextVAE(config, tokenizer.vocab_size).eval()
    with torch.no_grad():
        # Larger weights than at the start of training, so that the latent decides what is written.
        for parameter in vae.parameters():
            parameter.mul_(3.0)
    return TextModel(vae, tokenizer, max_tokens=12)


@pytest.fixture(scope="module", params=["lstm", "transformer"])
def model(request: pytest.FixtureRequest) -> TextModel:
    return text_model(request.param)


TEXTS = ["w01 w05 w02", "w07", "w10 w11 w12 w13 w14 w15", "w03 w03"]


def forced_log_probs(vae: TextVAE, tokens: list[int], z_D: torch.Tensor) -> torch.Tensor:
    """[T, V] under teacher forcing."""
    input_1T = torch.tensor([[BOS_ID, *tokens[:-1]]])
    with torch.no_grad():
        hidden = vae.to_embedding(vae.decoder(vae.embedding(input_1T), z_D[None], torch.tensor([len(tokens)])))
        return torch.log_softmax(F.linear(hidden, vae.embedding.weight, vae.output_bias)[0], -1)


def test_greedy_is_the_argmax_at_every_position(model: TextModel) -> None:
    _, rows, z_BD = model.sample(6, 0, GREEDY)
    assert len({tuple(row.tokens) for row in rows}) > 1
    for row, z_D in zip(rows, z_BD, strict=True):
        log_p = forced_log_probs(model.vae, row.tokens, z_D)
        log_p[:, [PAD_ID, BOS_ID, UNK_ID]] = -torch.inf
        assert log_p.argmax(-1).tolist() == row.tokens


def test_log_prob_is_the_teacher_forced_sum(model: TextModel) -> None:
    _, rows, z_BD = model.sample(6, 3, Decoding(temperature=1.3, max_tokens=12))
    for row, z_D in zip(rows, z_BD, strict=True):
        log_p = forced_log_probs(model.vae, row.tokens, z_D)
        assert row.log_prob == pytest.approx(float(log_p[range(len(row.tokens)), row.tokens].sum()), abs=1e-3)


def test_a_seed_gives_the_same_text_alone_or_in_a_batch(model: TextModel) -> None:
    decoding = Decoding(temperature=0.8, top_p=0.95, max_tokens=12)
    texts, rows, _ = model.sample(7, 100, decoding)
    assert len(set(texts)) > 3
    for i in range(7):
        assert model.sample(1, 100 + i, decoding)[:2] == ([texts[i]], [rows[i]])
    assert model.sample(7, 200, decoding)[0] != texts


def test_a_row_shorter_than_its_company_is_not_changed_by_it(model: TextModel) -> None:
    z_BD = prior_latents(model.vae, range(20), 12)
    together = generate(model.vae, z_BD, range(20), Decoding(max_tokens=12))
    alone = [generate(model.vae, z_BD[i : i + 1], [i], Decoding(max_tokens=12))[0] for i in range(20)]
    assert together == alone


def test_unknown_is_written_only_when_allowed(model: TextModel) -> None:
    model.vae.output_bias.data[UNK_ID] += 20.0
    try:
        with_unknown = model.sample(5, 0, Decoding(max_tokens=8, allow_unknown=True))[1]
        without = model.sample(5, 0, Decoding(max_tokens=8))[1]
    finally:
        model.vae.output_bias.data[UNK_ID] -= 20.0
    assert any(UNK_ID in row.tokens for row in with_unknown)
    assert not any({UNK_ID, BOS_ID, PAD_ID} & set(row.tokens) for row in without)


def test_prior_latents_are_standard_normal_and_depend_on_their_seed_alone() -> None:
    vae, seeds = standard(6), [5, 2**40, 0, 5]
    z_BD = prior_latents(vae, seeds, 12)
    assert torch.equal(z_BD[0], z_BD[3])
    for seed, z_D in zip(seeds, z_BD, strict=True):
        assert torch.equal(prior_latents(vae, [seed], 12)[0], z_D)
    assert torch.equal(prior_latents(vae, [5], 12, scale=0.5), 0.5 * z_BD[:1])
    many = prior_latents(standard(5), range(4000), 12)
    assert stats.kstest(many.flatten().numpy(), "norm").pvalue > 1e-4
    correlation = np.corrcoef(many.numpy().T) - np.eye(5)
    assert np.abs(correlation).max() < 5 / 4000**0.5


def test_latent_and_token_noise_are_independent() -> None:
    z = prior_latents(standard(1), range(4000), 12)[:, 0].numpy()
    uniform = philox_uniform(
        torch.zeros(2, dtype=torch.int64), torch.arange(4000), torch.tensor(0), stream=TOKEN_STREAM
    )
    assert abs(np.corrcoef(z, uniform.numpy())[0, 1]) < 5 / 4000**0.5


@pytest.mark.parametrize("path", ["linear", "slerp"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_interpolation_ends_at_the_reconstructions(model: TextModel, path: str, temperature: float) -> None:
    decoding = Decoding(temperature=temperature, max_tokens=12)
    t, texts, rows = model.interpolate(TEXTS[0], TEXTS[2], 5, path, 9, decoding)
    assert t == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(texts) == len(rows) == 5
    for end, text in ((0, TEXTS[0]), (-1, TEXTS[2])):
        assert texts[end] == model.reconstruct([text], 9, decoding)[0][0]


def test_reconstruction_decodes_the_posterior_mean(model: TextModel) -> None:
    encoded = model.encode(TEXTS)
    for one, text in zip(encoded, TEXTS, strict=True):
        ids = model.tokenizer.encode_batch([text])[0]
        assert one.ids.tolist() == list(ids) and not one.truncated
        mean_1D, logvar_1D = model.vae.encode(collate(Sequences.from_list([ids]), np.zeros(1, np.int64)))
        torch.testing.assert_close(one.mean, mean_1D[0].detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.logvar, logvar_1D[0].detach(), atol=1e-5, rtol=1e-5)
    texts, rows = model.reconstruct(TEXTS, 0, GREEDY)
    assert rows == generate(model.vae, torch.stack([one.mean for one in encoded]), range(4), GREEDY)
    assert texts == [model.tokenizer.decode(row.tokens) for row in rows]


def test_a_text_is_encoded_alike_alone_and_in_any_company(model: TextModel) -> None:
    many = [" ".join(WORDS[i : i + 1 + i % 7]) for i in range(25)] * 2
    together = model.encode(many)
    for text, one in zip(many[:8], together, strict=False):
        (alone,) = model.encode([text])
        assert torch.equal(alone.mean, one.mean) and torch.equal(alone.logvar, one.logvar)
    assert all(torch.equal(together[i].mean, together[i + 25].mean) for i in range(25))


def test_a_long_text_keeps_its_start_and_its_end_of_sequence(model: TextModel) -> None:
    exact, longer = " ".join(WORDS[:11]), " ".join(WORDS[:12])
    whole, cut = model.encode([exact, longer])
    assert (whole.truncated, cut.truncated) == (False, True)
    assert len(whole.ids) == 12 and whole.ids.tolist() == cut.ids.tolist()
    assert cut.ids[-1] == EOS_ID


@pytest.mark.parametrize("text", ["", "   "])
def test_a_text_without_a_word_is_refused(model: TextModel, text: str) -> None:
    with pytest.raises(DataError, match="holds no token"):
        model.encode(["w01", text])


def test_texts_are_scored_by_teacher_forcing_and_against_their_reconstruction(model: TextModel) -> None:
    texts = [TEXTS[0], " ".join(WORDS[:20])]
    _, rows = model.reconstruct(texts, 0, GREEDY)
    encoded = model.encode(texts)
    scores = score(model.vae, list(zip(encoded, rows, strict=True)))
    for i, (text, row, found) in enumerate(zip(encoded, rows, scores, strict=True)):
        tokens = text.ids.tolist()
        nll = -forced_log_probs(model.vae, tokens, text.mean)[range(len(tokens)), tokens].mean()
        assert found["nll_per_token"] == pytest.approx(float(nll), abs=1e-4)
        kl = 0.5 * (text.mean**2 + text.logvar.exp() - text.logvar - 1).sum()
        assert found["kl_per_seq"] == pytest.approx(float(kl), rel=1e-4)
        same = sum(a == b for a, b in zip(tokens, row.tokens, strict=False))
        assert found["token_accuracy"] == same / max(len(tokens), len(row.tokens))
        assert found["truncated"] == (i == 1)


def test_a_perfect_reconstruction_has_accuracy_one(model: TextModel) -> None:
    (text,) = model.encode([TEXTS[0]])
    tokens = text.ids.tolist()
    written = (
        Generated(tokens, 0.0, True),
        Generated(tokens[:2], 0.0, False),
        Generated([*tokens, 5, 5, 5, 5], 0.0, False),
    )
    perfect, cut, longer = score(model.vae, [(text, one) for one in written])
    assert (perfect["token_accuracy"], cut["token_accuracy"], longer["token_accuracy"]) == (1.0, 0.5, 0.5)
