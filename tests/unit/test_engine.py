"""The slot engine: the same bits in every slot and company, and requests that come, go and are refused."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from vae_dist.config.model_schema import BagOfWordsConfig, LstmConfig, ModelConfig, TransformerConfig
from vae_dist.data.text.special_ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from vae_dist.decode.choose import Chooser, at_uniform
from vae_dist.decode.engine import DecodeEngine, generate
from vae_dist.decode.request import Decoding, Emitted, Generated, Request
from vae_dist.errors import DataError, OverloadedError
from vae_dist.model.vae import TextVAE

VOCAB, LENGTH, D = 301, 40, 6
SLOTS = 64
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"decoder": LstmConfig(hidden_dim=48), "injection": "both"},
    "two layers": {"decoder": LstmConfig(hidden_dim=24, num_layers=2)},
    "words at once": {"decoder": LstmConfig(hidden_dim=24), "teacher_forcing": False},
    "a latent a token": {"decoder": LstmConfig(hidden_dim=24), "latent": "token", "injection": "embedding"},
    "prefix": {"decoder": TransformerConfig(hidden_dim=32, num_layers=2, num_heads=2), "injection": "both"},
    "slot": {"decoder": TransformerConfig(hidden_dim=32, num_layers=2, num_heads=2), "injection": "layers"},
    "cross": {"decoder": TransformerConfig(hidden_dim=32, num_layers=2, num_heads=2), "injection": "cross_attention"},
    "bag of words": {"decoder": BagOfWordsConfig()},
    "language model": {"decoder": LstmConfig(hidden_dim=24), "latent": "none"},
}
CPU = torch.device("cpu")


def make_vae(name: str) -> TextVAE:
    torch.manual_seed(1)
    config = ModelConfig(embedding_dim=20, latent_dim=D, encoder=LstmConfig(hidden_dim=8), **MODELS[name])
    vae = TextVAE(config, VOCAB).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(2.0)
        vae.output_bias[EOS_ID] = 1.0
    return vae


def make_requests(vae: TextVAE, count: int, seed: int = 0) -> list[Request]:
    """Each with options of its own."""
    options = itertools.cycle(
        [
            Decoding(max_tokens=LENGTH), Decoding(0.7, max_tokens=25), Decoding(0.0, max_tokens=LENGTH),
            Decoding(1.3, top_k=20, max_tokens=30), Decoding(top_p=0.8, max_tokens=LENGTH, repetition_penalty=1.5),
            Decoding(2.0, top_k=50, top_p=0.9, max_tokens=33, allow_unknown=True),
        ]
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shape = (LENGTH, vae.latent_dim) if vae.per_token else (vae.latent_dim,)
    latents = [torch.randn(shape, generator=generator) for _ in range(count)]
    return [Request(z, seed + i, one) for i, (z, one) in enumerate(zip(latents, options, strict=False))]


def finish(engine: DecodeEngine, *handles: int) -> list[Generated]:
    """Step until these have ended."""
    parts: dict[int, list[Emitted]] = {handle: [] for handle in handles}
    while not all(part and part[-1].finish for part in parts.values()):
        for one in engine.step():
            parts.setdefault(one.handle, []).append(one)
    return [Generated.of(parts[handle]) for handle in handles]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_request_has_the_same_bits_alone_among_seven_and_among_sixty_four(
    name: str, dtype: torch.dtype | None
) -> None:
    vae = make_vae(name)
    engine = DecodeEngine(vae, LENGTH, slots=SLOTS, dtype=dtype)
    requests = make_requests(vae, 150)
    alone = [engine.run([request])[0] for request in requests[:14]]
    assert len({tuple(row.tokens) for row in alone}) > 10
    for first in (0, 7):
        assert engine.run(requests[first : first + 7]) == alone[first : first + 7]
    # More than there are slots: they join when others leave.
    together = engine.run(requests)
    assert together[:14] == alone
    assert engine.run(requests[::-1])[::-1] == together


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["lstm", "prefix", "slot"])
def test_a_request_has_the_same_bits_in_every_slot(name: str, dtype: torch.dtype | None) -> None:
    vae = make_vae(name)
    engine = DecodeEngine(vae, LENGTH, slots=SLOTS, dtype=dtype)
    (alone,) = engine.run(make_requests(vae, 1))
    assert engine.run(make_requests(vae, 1) * SLOTS) == [alone] * SLOTS
    # In a slot where others were before, at another time than its neighbours.
    others = make_requests(vae, 3 * SLOTS, seed=99)
    for request in others[:SLOTS]:
        engine.submit(request)
    for step in range(0, SLOTS, 9):
        for _ in range(step % 5):
            engine.step()
        for request in others[SLOTS : SLOTS + step]:
            engine.submit(request)
        assert finish(engine, engine.submit(make_requests(vae, 1)[0])) == [alone]


def test_the_engine_uses_only_shapes_with_the_bits_of_the_whole() -> None:
    class Uneven(torch.nn.Module):
        """A span of 32 differs in the last bits, and so does a batch of `rows`."""

        per_token, latent_dim, vocab_size, first_position = False, 1, 9, 0

        def __init__(self, rows: int) -> None:
            super().__init__()
            self.rows = rows
            self.output_bias = torch.zeros(9)
            self.decoder: Any = self
            self.shapes: list[tuple[int, int]] = []

        def new_state(self, rows: int, max_tokens: int) -> list[torch.Tensor]:
            return []

        def step(self, token: torch.Tensor, z: Any, state: Any, position: torch.Tensor, span: int) -> torch.Tensor:
            self.shapes.append((len(token), span))
            wrong = 2.0**-20 * (len(token) == self.rows or span == 32)
            return torch.linspace(0.5, 1.0, 9).repeat(len(token), 1) * (1.0 + wrong)

    assert DecodeEngine(Uneven(8), 80).row_shapes == [64]  # type: ignore[arg-type]
    vae: Any = Uneven(0)
    engine = DecodeEngine(vae, 80)
    assert (engine.row_shapes, engine.span_shapes) == ([8, 64], [64, 80])
    vae.shapes.clear()
    engine.run([Request(torch.zeros(1), 0, Decoding(max_tokens=80))])
    assert set(vae.shapes) <= {(8, 64), (8, 80)}


def test_a_cancelled_request_frees_its_slot_at_once_and_changes_no_other() -> None:
    vae = make_vae("lstm")
    engine = DecodeEngine(vae, LENGTH, slots=2, queue=8)
    vae.output_bias.data[EOS_ID] = -50.0
    requests = [Request(torch.randn(D), i, Decoding(max_tokens=9)) for i in range(4)]
    expected = engine.run(requests)
    first, second, third, fourth = (engine.submit(request) for request in requests)
    assert {one.handle for one in engine.step()} == {first, second}
    assert engine.cancel(first) and not engine.cancel(first) and engine.cancel(fourth)
    assert {one.handle for one in engine.step()} == {second, third}
    parts: dict[int, list[int]] = {second: [], third: []}
    while not engine.idle:
        for one in engine.step():
            parts[one.handle].append(one.token)
    assert parts[third] == expected[2].tokens[1:] and parts[second] == expected[1].tokens[2:]
    assert engine.step() == [] and not engine.cancel(second)


def test_queue_and_token_budget_are_bounded_and_given_back() -> None:
    vae = make_vae("lstm")
    engine = DecodeEngine(vae, LENGTH, slots=2, queue=1, token_budget=100)
    request = Request(torch.zeros(D), 0, Decoding(0.0, max_tokens=10))
    for _ in range(3):
        engine.submit(request)
    with pytest.raises(OverloadedError, match="there is room for 1 waiting and 100 tokens"):
        engine.submit(request)
    engine.run([])
    assert engine.idle
    long = Request(torch.zeros(D), 0, Decoding(0.0, max_tokens=40))
    handles = [engine.submit(long), engine.submit(long)]
    with pytest.raises(OverloadedError):
        engine.submit(long)
    engine.submit(Request(torch.zeros(D), 0, Decoding(0.0, max_tokens=20)))
    engine.cancel(handles[0])
    engine.submit(long)
    engine.run([])
    # As many as you like may be run: they wait outside.
    assert len(engine.run([request] * 50)) == 50


@pytest.mark.parametrize("tokens", [0, LENGTH + 1])
def test_requests_that_no_slot_has_room_for_are_refused(tokens: int) -> None:
    engine = DecodeEngine(make_vae("lstm"), LENGTH, slots=2)
    with pytest.raises(DataError, match=f"A row of {tokens} tokens .* room for 1 to {LENGTH}"):
        engine.submit(Request(torch.zeros(D), 0, Decoding(max_tokens=tokens)))


def test_bfloat16_stays_near_float32() -> None:
    vae = make_vae("prefix")
    z = torch.randn(50, D)
    greedy = Decoding(0.0, max_tokens=1)
    exact = generate(vae, z, [0] * 50, greedy)
    rounded = DecodeEngine(vae, 1, dtype=torch.bfloat16).run([Request(row, 0, greedy) for row in z])
    assert sum(a.tokens == b.tokens for a, b in zip(exact, rounded, strict=True)) > 40
    assert np.mean([abs(a.log_prob - b.log_prob) for a, b in zip(exact, rounded, strict=True)]) < 0.1
    assert vae.output_bias.dtype == torch.float32 and vae.encoder is not None


def choose(logits: torch.Tensor, uniform: torch.Tensor, written: list[int] | None = None, **options: Any) -> np.ndarray:
    """One token for each uniform number, all rows with the same logits."""
    rows = len(uniform)
    chooser = Chooser([Decoding(**options)] * rows, CPU)
    return chooser(logits.repeat(rows, 1), uniform, [written or []] * rows)[0].numpy()


@pytest.mark.parametrize("size", [5, 128, 129, 1000])
def test_tokens_of_a_large_vocabulary_are_drawn_in_proportion_to_their_weights(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weight = torch.rand(size, generator=generator) ** 4
    weight[torch.rand(size, generator=generator) < 0.3] = 0.0
    weight[-1] = 0.0
    uniform = (torch.arange(200_000) + torch.rand(200_000, generator=generator)) / 200_000
    counts = np.zeros(size)
    for part in uniform.clamp(max=1.0 - 2.0**-24).split(2000):
        counts += np.bincount(at_uniform(weight.repeat(len(part), 1), part).numpy(), minlength=size)
    share = weight.double().numpy() / weight.double().sum().item()
    # The numbers are spread evenly: counts differ from the shares by what a border cuts off.
    assert np.abs(counts - share * 200_000).max() < 3.0
    assert counts[share == 0].sum() == 0


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_k": 200}, {"top_p": 0.5}, {"top_p": 0.999, "temperature": 2.0}]
)
def test_of_a_large_vocabulary_the_likeliest_stay_and_no_others(options: dict[str, Any]) -> None:
    """More tokens than the candidates that are looked at first, with ties, against a sort in float64."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(2000, generator=generator) * 8).round() / 8
    allowed = [i for i in range(2000) if i not in (PAD_ID, BOS_ID, UNK_ID)]
    scaled = logits.double() / options.get("temperature", 1.0)
    ranked = sorted(allowed, key=lambda i: (-float(scaled[i]), i))
    probability = torch.softmax(scaled[ranked], 0)
    before = probability.cumsum(0) - probability
    stays = (before < options.get("top_p", 2.0)) & (torch.arange(len(ranked)) < options.get("top_k", 2000))
    kept = [i for i, stay in zip(ranked, stays.tolist(), strict=True) if stay]
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = Counter(np.concatenate([choose(logits, part, **options) for part in uniform.split(1000)]).tolist())
    assert set(drawn) <= set(kept)
    share = torch.softmax(scaled[kept], 0).numpy() * 20_000
    assert max(abs(drawn[token] - expected) for token, expected in zip(kept, share, strict=True)) < 3.0


def test_samples_of_mixed_options_follow_their_own_distributions() -> None:
    """One step with plain, cut and penalised rows together: chi-square of each kind against float64."""
    logits = torch.tensor([0.0, 0.0, 1.0, 5.0, 2.0, 1.5, -1.0, 0.5])
    kinds = {
        Decoding(): lambda x: x,
        Decoding(temperature=0.5, top_k=3): lambda x: np.where(x >= np.sort(x)[-3], x / 0.5, -np.inf),
        Decoding(repetition_penalty=2.0): lambda x: x * [1, 1, 1, 1, 0.5, 1, 2, 1],
    }  # fmt: skip
    rows = [kind for kind in kinds for _ in range(4000)]
    uniform = torch.rand(len(rows), generator=torch.Generator().manual_seed(0))
    tokens, log_probs = Chooser(rows, CPU)(logits.repeat(len(rows), 1), uniform, [[4, 6, 4]] * len(rows))
    own = torch.log_softmax(logits.double(), 0)
    torch.testing.assert_close(log_probs, own[tokens], atol=1e-6, rtol=0.0)
    plain = logits.double().numpy().copy()
    plain[[PAD_ID, BOS_ID, UNK_ID]] = -np.inf
    for number, change in enumerate(kinds.values()):
        score = change(plain)
        share = np.exp(score - score[np.isfinite(score)].max())
        share /= share.sum()
        counts = np.bincount(tokens[number * 4000 : (number + 1) * 4000].numpy(), minlength=8)
        assert counts[share == 0].sum() == 0
        assert stats.chisquare(counts[share > 0], 4000 * share[share > 0]).pvalue > 1e-4


def test_a_greedy_row_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([9.0, 9.0, 1.0, 9.0, 3.0, 2.0, -1.0])
    assert choose(logits, torch.zeros(1), temperature=0.0).tolist() == [4]
    assert choose(logits, torch.zeros(1), [4], temperature=0.0, repetition_penalty=2.0).tolist() == [5]
    assert choose(logits, torch.zeros(1), [4], temperature=0.0, repetition_penalty=1.2).tolist() == [4]
