"""Encoders and decoders against explicit computations in fp64: each way in which a latent reaches the words.

Shapes: B sequences, T positions, E embedding, D latent, W width, N heads, K head size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vae_dist.config.model_schema import BagOfWordsConfig, LstmConfig, ModelConfig, TransformerConfig
from vae_dist.model.bag_of_words import BagOfWordsDecoder, BagOfWordsEncoder
from vae_dist.model.lstm import LstmDecoder, LstmEncoder
from vae_dist.model.transformer import TransformerDecoder, TransformerEncoder

E, D = 6, 4
PARTS = {
    "lstm": LstmConfig(hidden_dim=5),
    "lstm2": LstmConfig(hidden_dim=5, num_layers=2),
    "transformer": TransformerConfig(hidden_dim=8, num_layers=2, num_heads=2),
    "bag_of_words": BagOfWordsConfig(),
}
TRANSFORMER_INJECTIONS = ("embedding", "memory", "both", "layers", "cross_attention")
PER_TOKEN = {"latent": "token", "injection": "embedding"}
ALL_AT_ONCE = {"teacher_forcing": False}
DECODERS: list[tuple[str, dict[str, Any]]] = [
    *(("transformer", {"injection": injection}) for injection in TRANSFORMER_INJECTIONS),
    *((lstm, {"injection": i} | t) for lstm in ("lstm", "lstm2") for i in ("embedding", "memory", "both")
      for t in ({}, ALL_AT_ONCE)),
    *((kind, PER_TOKEN) for kind in ("lstm", "lstm2", "transformer", "bag_of_words")),
    ("lstm", PER_TOKEN | ALL_AT_ONCE),
    *((kind, {"latent": "none"}) for kind in PARTS),
    ("bag_of_words", {}),
]  # fmt: skip
ENCODERS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"bidirectional": both, "latent": latent}) for kind in ("lstm", "lstm2") for both in (False, True)
      for latent in ("sequence", "token")),
    ("transformer", {}),
    ("transformer", {"latent": "token"}),
    ("bag_of_words", {}),
]  # fmt: skip


def name_of(case: object) -> str:
    return " ".join(str(v) for v in case.values()) if isinstance(case, dict) else str(case)


def randomise(module: nn.Module) -> Any:
    """float64, in evaluation mode, with every parameter random: a forgotten bias or norm shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.eval()


def make_decoder(kind: str, recompute: bool = False, **changes: Any) -> Any:
    model = ModelConfig(embedding_dim=E, latent_dim=D, decoder=PARTS[kind], **changes)
    part = model.decoder
    if isinstance(part, LstmConfig):
        return randomise(LstmDecoder(part, model))
    if isinstance(part, TransformerConfig):
        return randomise(TransformerDecoder(part, model, recompute))
    return randomise(BagOfWordsDecoder(model))


def make_encoder(kind: str, **changes: Any) -> Any:
    model = ModelConfig(embedding_dim=E, latent_dim=D, encoder=PARTS[kind], **changes)
    part = model.encoder
    if isinstance(part, LstmConfig):
        return randomise(LstmEncoder(part, model))
    if isinstance(part, TransformerConfig):
        return randomise(TransformerEncoder(part, model, recompute=False))
    return randomise(BagOfWordsEncoder(model))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents(count: int, length: int, latent: str = "sequence", **_: Any) -> torch.Tensor:
    return random(*{"sequence": (count, D), "token": (count, length, D), "none": (count, 0)}[latent], seed=1)


def equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("kind", "changes"), DECODERS, ids=name_of)
@torch.no_grad()
def test_step_by_step_is_teacher_forcing(kind: str, changes: dict[str, Any]) -> None:
    decoder, x_BTE, z = make_decoder(kind, **changes), random(3, 7, E), latents(3, 7, **changes)
    hidden = torch.full((3, 7, decoder.output_dim), torch.nan, dtype=torch.float64)
    # Rows begin at different times, in a state where others were before, and end at different times.
    state = [part.normal_() for part in decoder.new_state(3, 7)]
    for time in range(decoder.first_position, 11):
        due_B = time - torch.tensor([0, 3, 1])
        position_B = due_B.clamp(decoder.first_position, 6)
        row, real_B = torch.arange(3), position_B.clamp(min=0)
        z_BD = z[row, real_B] if z.dim() == 3 else z
        h_BH = decoder.step(x_BTE[row, real_B], z_BD, state, position_B, int(position_B.max()) + 1)
        written_B = (due_B >= 0) & (due_B < 7)
        hidden[row[written_B], real_B[written_B]] = h_BH[written_B]
    equal(hidden, decoder(x_BTE, z, torch.tensor([7, 7, 7])))


@pytest.mark.parametrize(("kind", "changes"), DECODERS, ids=name_of)
@torch.no_grad()
def test_a_decoders_states_do_not_depend_on_company_and_padding(kind: str, changes: dict[str, Any]) -> None:
    decoder, x_BTE, z = make_decoder(kind, **changes), random(3, 7, E), latents(3, 7, **changes)
    together = decoder(x_BTE, z, torch.tensor([7, 4, 1]))
    for row, length in enumerate((7, 4, 1)):
        z_row = z[row : row + 1, :length] if z.dim() == 3 else z[row : row + 1]
        alone = decoder(x_BTE[row : row + 1, :length], z_row, torch.tensor([length]))
        equal(alone[0], together[row, :length])


@pytest.mark.parametrize(("kind", "changes"), ENCODERS, ids=name_of)
@torch.no_grad()
def test_an_encoding_does_not_depend_on_company_and_padding(kind: str, changes: dict[str, Any]) -> None:
    encoder, x_BTE, lengths_B = make_encoder(kind, **changes), random(3, 7, E), torch.tensor([7, 4, 1])
    together = encoder(x_BTE, lengths_B)
    assert together.shape[-1] == encoder.output_dim
    assert together.isfinite().all()
    for row, length in enumerate(lengths_B.tolist()):
        alone = encoder(x_BTE[row : row + 1, :length], torch.tensor([length]))[0]
        equal(alone, together[row, :length] if changes.get("latent") == "token" else together[row])


@pytest.mark.parametrize(("kind", "changes"), DECODERS, ids=name_of)
def test_each_state_hears_the_words_up_to_its_own_and_its_latents(kind: str, changes: dict[str, Any]) -> None:
    decoder = make_decoder(kind, **changes)
    x_BTE, z = random(1, 5, E).requires_grad_(), latents(1, 5, **changes).requires_grad_()
    hidden_BTH = decoder(x_BTE, z, torch.tensor([5]))
    reads_words = kind != "bag_of_words" and changes.get("teacher_forcing", True)
    for t in range(5):
        wanted = hidden_BTH[0, t] @ random(hidden_BTH.shape[-1])
        inputs = [x for x in (x_BTE, z) if x.numel()]
        if not wanted.requires_grad:
            assert (kind, changes.get("latent")) == ("bag_of_words", "none")
            continue
        to_x, *to_z = torch.autograd.grad(wanted, inputs, retain_graph=True, allow_unused=True)
        heard_T = torch.zeros(5, dtype=torch.bool) if to_x is None else (to_x[0] != 0).any(-1)
        assert heard_T.tolist() == [bool(reads_words and s <= t) for s in range(5)]
        for gradient in to_z:
            heard = (gradient[0] != 0).all(-1)
            token = [s == t if kind == "bag_of_words" else s <= t for s in range(5)]
            assert heard.tolist() == (token if z.dim() == 3 else True)


@pytest.mark.parametrize("injection", TRANSFORMER_INJECTIONS)
def test_the_latent_reaches_every_block_that_it_is_injected_into(injection: str) -> None:
    decoder = make_decoder("transformer", injection=injection)
    decoder(random(2, 3, E), latents(2, 3), torch.tensor([3, 3])).square().sum().backward()
    injected = {n: p.grad for n, p in decoder.named_parameters() if n.startswith("to_") and "bias" not in n}
    names = {
        "embedding": ["to_input"],
        "memory": ["to_prefix"],
        "both": ["to_input", "to_prefix"],
        "layers": ["to_slots.0", "to_slots.1"],
        "cross_attention": ["to_cross.0", "to_cross.1"],
    }
    assert sorted(injected) == [f"{name}.weight" for name in names[injection]]
    for name, gradient in injected.items():
        assert gradient is not None, name
        assert (gradient != 0).all(), name


def explicit_transformer(
    decoder: TransformerDecoder, x_BTE: torch.Tensor, z_BD: torch.Tensor, injection: str
) -> torch.Tensor:
    """The decoder once more: complex rotary, explicit masks and softmax, cross-attention as attention."""
    weights = dict(decoder.named_parameters())
    if injection in ("embedding", "both"):
        x_BTE = x_BTE + (z_BD @ weights["to_input.weight"].T)[:, None]
    x = x_BTE @ weights["input.weight"].T
    if injection in ("memory", "both"):
        x = torch.cat([(z_BD @ weights["to_prefix.weight"].T + weights["to_prefix.bias"])[:, None], x], 1)
    for i in range(len(decoder.blocks)):
        block = {n.removeprefix(f"blocks.{i}."): p for n, p in weights.items() if n.startswith(f"blocks.{i}.")}
        q, k, v = (_norm(x, block["attention_norm.weight"]) @ block["qkv.weight"].T).chunk(3, -1)
        q, k, v = _turned(_heads(q)), _turned(_heads(k)), _heads(v)
        seen_TS = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        if injection == "layers":
            slot_k, slot_v = (z_BD @ weights[f"to_slots.{i}.weight"].T)[:, None].chunk(2, -1)
            k, v = torch.cat([_heads(slot_k), k], 2), torch.cat([_heads(slot_v), v], 2)
            seen_TS = F.pad(seen_TS, (1, 0), value=True)
        score = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen_TS, -torch.inf)
        x = x + (score.softmax(-1) @ v).transpose(1, 2).flatten(2) @ block["attention_out.weight"].T
        if injection == "cross_attention":
            x = x + _cross_attention(x, z_BD, seed=i)
        gate, up = (_norm(x, block["mlp_norm.weight"]) @ block["gate_up.weight"].T).chunk(2, -1)
        x = x + (gate / (1 + (-gate).exp()) * up) @ block["down.weight"].T
    x = _norm(x, weights["norm.weight"])
    return x[:, 1:] if injection in ("memory", "both") else x


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weight


def _heads(x_BTW: torch.Tensor) -> torch.Tensor:
    return x_BTW.unflatten(-1, (2, -1)).transpose(1, 2)


def _turned(x_BNTK: torch.Tensor) -> torch.Tensor:
    half = x_BNTK.shape[-1] // 2
    angle = torch.arange(x_BNTK.shape[2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(*x_BNTK.chunk(2, -1)) * torch.polar(torch.ones(()).double(), angle.double())
    return torch.cat([turned.real, turned.imag], -1)


def _cross_matrices(seed: int) -> list[torch.Tensor]:
    """W_q [W, W], W_k and W_v [W, D], W_o [W, W] of a cross-attention."""
    return [random(8, columns, seed=10 * seed + i) for i, columns in enumerate((8, D, D, 8))]


def _cross_attention(x_BTW: torch.Tensor, z_BD: torch.Tensor, seed: int) -> torch.Tensor:
    """The memory is z alone, in torch's own attention."""
    w_q, w_k, w_v, w_o = _cross_matrices(seed)
    q, k, v = _heads(x_BTW @ w_q.T), _heads((z_BD @ w_k.T)[:, None]), _heads((z_BD @ w_v.T)[:, None])
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ w_o.T


@pytest.mark.parametrize("injection", TRANSFORMER_INJECTIONS)
@torch.no_grad()
def test_the_transformer_decoder_is_the_explicit_one(injection: str) -> None:
    decoder = make_decoder("transformer", injection=injection)
    if decoder.to_cross is not None:
        for i, projection in enumerate(decoder.to_cross):
            _, _, w_v, w_o = _cross_matrices(seed=i)
            projection.weight.copy_(w_o @ w_v)
    x_BTE, z_BD = random(3, 7, E), latents(3, 7)
    actual = decoder(x_BTE, z_BD, torch.tensor([7, 7, 7]))
    # Angles are float32 in the model.
    torch.testing.assert_close(actual, explicit_transformer(decoder, x_BTE, z_BD, injection), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("injection", TRANSFORMER_INJECTIONS)
def test_recomputed_blocks_give_the_same_gradient(injection: str) -> None:
    gradients = []
    for recompute in (False, True):
        decoder = make_decoder("transformer", recompute, injection=injection, dropout=0.3).train()
        torch.manual_seed(7)
        decoder(random(2, 5, E), latents(2, 5), torch.tensor([5, 2])).square().sum().backward()
        gradients.append([p.grad for p in decoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        equal(one, other)


@pytest.mark.parametrize("latent", ["sequence", "token"])
@pytest.mark.parametrize("words", ["random", "none at all"])
@torch.no_grad()
def test_without_teacher_forcing_the_lstm_reads_the_latent_alone(latent: str, words: str) -> None:
    decoder = make_decoder("lstm2", latent=latent, injection="embedding", teacher_forcing=False)
    z = latents(3, 7, latent)
    x_BTE = random(3, 7, E) if words == "random" else torch.full((3, 7, E), torch.nan, dtype=torch.float64)
    z_BTD = z if z.dim() == 3 else z[:, None].repeat(1, 7, 1)
    reference = nn.LSTM(E, 5, 2, batch_first=True).double()
    reference.load_state_dict(decoder.lstm.state_dict())
    equal(decoder(x_BTE, z, torch.tensor([7, 7, 7])), reference(z_BTD @ decoder.to_input.weight.T)[0])


@torch.no_grad()
def test_a_language_model_has_no_latent_and_is_torchs_lstm() -> None:
    for kind in PARTS:
        decoder = make_decoder(kind, latent="none")
        assert not [name for name, _ in decoder.named_parameters() if name.startswith("to_")]
    decoder, x_BTE = make_decoder("lstm2", latent="none"), random(3, 7, E)
    reference = nn.LSTM(E, 5, 2, batch_first=True).double()
    reference.load_state_dict(decoder.lstm.state_dict())
    equal(decoder(x_BTE, latents(3, 7, "none"), torch.tensor([7, 7, 7])), reference(x_BTE)[0])


@torch.no_grad()
def test_the_states_of_both_directions_stand_at_their_tokens() -> None:
    encoder = make_encoder("lstm", bidirectional=True, latent="token")
    reference = nn.LSTM(E, 5, batch_first=True, bidirectional=True).double()
    for name, weight in encoder.forward_lstm.named_parameters():
        getattr(reference, name).copy_(weight)
        getattr(reference, f"{name}_reverse").copy_(getattr(encoder.backward_lstm, name))
    x_BTE, lengths_B = random(4, 9, E), torch.tensor([5, 1, 9, 2])
    packed = nn.utils.rnn.pack_padded_sequence(x_BTE, lengths_B, batch_first=True, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
    real_BT = torch.arange(9) < lengths_B[:, None]
    equal(encoder(x_BTE, lengths_B)[real_BT], expected[real_BT])


@torch.no_grad()
def test_the_bag_of_words_is_linear_in_the_counts_and_scores_a_multinomial() -> None:
    vocabulary, lengths_B = 11, torch.tensor([9, 4, 1])
    weight_VE, bias_V = random(vocabulary, E), random(vocabulary)
    tokens_BT = torch.randint(vocabulary, (3, 9), generator=torch.Generator().manual_seed(0))
    counts_BV = torch.stack(
        [row[:n].bincount(minlength=vocabulary) for row, n in zip(tokens_BT, lengths_B, strict=True)]
    )
    counts_BV = counts_BV.double()
    encoded = make_encoder("bag_of_words")(weight_VE[tokens_BT], lengths_B)
    equal(encoded, counts_BV @ weight_VE / lengths_B[:, None])
    decoder, z_BD = make_decoder("bag_of_words"), latents(3, 9)
    log_p_BTV = (decoder(weight_VE[tokens_BT], z_BD, lengths_B) @ weight_VE.T + bias_V).log_softmax(-1)
    logits_BV = z_BD @ (weight_VE @ decoder.to_hidden.weight).T + bias_V
    for row, n in enumerate(lengths_B.tolist()):
        multinomial = torch.distributions.Multinomial(n, logits=logits_BV[row], validate_args=False)
        coefficient = torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(counts_BV[row] + 1).sum()
        log_p = log_p_BTV[row, range(n), tokens_BT[row, :n]].sum()
        equal(log_p + coefficient, multinomial.log_prob(counts_BV[row]))


@pytest.mark.parametrize(("kind", "changes"), DECODERS, ids=name_of)
def test_gradients_of_decoders_against_finite_differences(kind: str, changes: dict[str, Any]) -> None:
    decoder = make_decoder(kind, **changes)
    x_BTE, z = random(2, 3, E).requires_grad_(), latents(2, 3, **changes).requires_grad_()
    if decoder(x_BTE, z, torch.tensor([3, 2])).requires_grad:
        _check_gradient(lambda x, z: decoder(x, z, torch.tensor([3, 2])), decoder, x_BTE, z)


@pytest.mark.parametrize(("kind", "changes"), ENCODERS, ids=name_of)
def test_gradients_of_encoders_against_finite_differences(kind: str, changes: dict[str, Any]) -> None:
    encoder = make_encoder(kind, **changes)
    _check_gradient(lambda x: encoder(x, torch.tensor([3, 2])), encoder, random(2, 3, E).requires_grad_())


def _check_gradient(run: Any, module: nn.Module, *inputs: torch.Tensor) -> None:
    # The parameters are perturbed in place, where the module reads them.
    everything = (*inputs, *module.parameters())
    assert torch.autograd.gradcheck(lambda *tensors: run(*tensors[: len(inputs)]), everything, fast_mode=True)
