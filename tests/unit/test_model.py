"""The model: incremental and teacher-forced decoding agree, padding and company change nothing, gradients are right."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vae_dist.config.model_schema import LstmConfig, ModelConfig, TransformerConfig
from vae_dist.config.objective_schema import ObjectiveConfig
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import Batch, collate
from vae_dist.data.text.special_ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from vae_dist.model.lstm import LstmEncoder
from vae_dist.model.vae import TextVAE, VaeOutput, count_parameters
from vae_dist.objective.elbo import NegativeElbo

VOCAB = 23
RNG = torch.tensor([3, 5])
BACKBONES = {
    "lstm": LstmConfig(hidden_dim=12),
    "lstm2": LstmConfig(hidden_dim=12, num_layers=2),
    "transformer": TransformerConfig(hidden_dim=16, num_layers=2, num_heads=2),
}
INJECTIONS = ("embedding", "memory", "both")


def make_vae(encoder: str = "lstm", decoder: str = "lstm", seed: int = 0, **changes: Any) -> TextVAE:
    values = {"embedding_dim": 10, "latent_dim": 5, "dropout": 0.0}
    recompute = changes.pop("activation_checkpointing", False)
    config = ModelConfig(encoder=BACKBONES[encoder], decoder=BACKBONES[decoder], **(values | changes))
    torch.manual_seed(seed)
    vae = TextVAE(config, VOCAB, activation_checkpointing=recompute)
    # Biases start at zero, where a forgotten one would not show.
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "bias" in name:
                parameter.uniform_(-0.3, 0.3)
    return vae.eval()


def make_batch(lengths: list[int], first_id: int = 0, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    rows = [np.append(rng.integers(UNK_ID + 1, VOCAB, n - 1), EOS_ID) for n in lengths]
    return collate(Sequences.from_list(rows), np.arange(first_id, first_id + len(rows)))


def row_of(batch: Batch, row: int) -> Batch:
    """One sequence of a batch, alone."""
    length = int(batch.lengths_B[row])
    tokens = batch.tokens_BT[row, :length].numpy()
    return collate(Sequences(tokens, np.array([0, length])), batch.sample_id_B[row : row + 1].numpy())


def teacher_forced_logits(vae: TextVAE, batch: Batch, z_BD: torch.Tensor) -> torch.Tensor:
    """[B, T, V], by the parts that `forward` is made of."""
    input_BT = F.pad(batch.tokens_BT[:, :-1], (1, 0), value=BOS_ID)
    hidden = vae.to_embedding(vae.decoder(vae.embedding(input_BT), z_BD, batch.lengths_B))
    weight = vae.embedding.weight if vae.output_weight is None else vae.output_weight
    return hidden @ weight.T + vae.output_bias


def incremental_logits(vae: TextVAE, batch: Batch, z_BD: torch.Tensor) -> torch.Tensor:
    token_B = torch.full((len(z_BD),), BOS_ID)
    count, length = batch.tokens_BT.shape
    state, steps = vae.decoder.new_state(count, length), []
    for position in range(vae.decoder.first_position, length):
        logits_BV = vae.step(token_B, z_BD, state, torch.full((count,), position), length)
        if position >= 0:
            steps.append(logits_BV)
            token_B = batch.tokens_BT[:, position]
    return torch.stack(steps, dim=1)


def nll(logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum over each sequence's real tokens, [B]."""
    rows = [
        F.cross_entropy(logits[:n].double(), tokens[:n], reduction="sum")
        for logits, tokens, n in zip(logits_BTV, batch.tokens_BT, batch.lengths_B.tolist(), strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("decoder", BACKBONES)
@torch.no_grad()
def test_incremental_decoding_equals_teacher_forcing(decoder: str, injection: str, tie: bool) -> None:
    vae = make_vae(decoder=decoder, injection=injection, tie_embeddings=tie)
    batch, z_BD = make_batch([7, 4, 1]), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    rec_B = vae(batch, RNG, z=z_BD).rec_KB[0].double()
    step_by_step = incremental_logits(vae, batch, z_BD)
    torch.testing.assert_close(rec_B, nll(step_by_step, batch), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(step_by_step, teacher_forced_logits(vae, batch, z_BD), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("decoder", BACKBONES)
@torch.no_grad()
def test_the_decoder_is_causal_and_hears_the_latent(decoder: str, injection: str) -> None:
    vae = make_vae(decoder=decoder, injection=injection)
    batch, z_BD = make_batch([8, 8]), torch.randn(2, 5)
    before = teacher_forced_logits(vae, batch, z_BD)
    for changed in (0, 3, 6):
        tokens_BT = batch.tokens_BT.clone()
        tokens_BT[:, changed] = (tokens_BT[:, changed] - 3) % (VOCAB - 4) + 4
        after = teacher_forced_logits(vae, dataclasses.replace(batch, tokens_BT=tokens_BT), z_BD)
        torch.testing.assert_close(after[:, : changed + 1], before[:, : changed + 1], atol=1e-6, rtol=1e-6)
        assert ((after - before)[:, changed + 1 :].abs().amax(-1) > 1e-5).all()
    other = teacher_forced_logits(vae, batch, z_BD.flip(0))
    assert ((other - before).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_the_lstm_decoder_starts_from_the_latent_in_every_layer() -> None:
    decoder = make_vae(decoder="lstm2", injection="memory").decoder
    x_BTE, z_BD = torch.randn(3, 6, 10), torch.randn(3, 5)
    cell = torch.stack([part @ z_BD.T for part in decoder.to_cell.weight.chunk(2)]).transpose(1, 2)
    cell = cell + torch.stack(decoder.to_cell.bias.chunk(2))[:, None]
    expected, _ = decoder.lstm(x_BTE, (cell.tanh().contiguous(), cell.contiguous()))
    torch.testing.assert_close(decoder(x_BTE, z_BD, torch.tensor([6, 6, 6])), expected, atol=1e-6, rtol=1e-5)


ENCODERS = [("lstm", False), ("lstm2", False), ("lstm", True), ("lstm2", True), ("transformer", False)]


@pytest.mark.parametrize(("encoder", "bidirectional"), ENCODERS)
@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_company(encoder: str, bidirectional: bool) -> None:
    decoder = "transformer" if encoder == "transformer" else "lstm"
    vae = make_vae(encoder, decoder, bidirectional=bidirectional)
    batch = make_batch([3, 9, 1, 6], first_id=2**33)
    together = vae(batch, RNG)
    for row in range(4):
        alone = vae(row_of(batch, row), RNG)
        for name in ("mean_RD", "logvar_RD"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.rec_KB[:, 0], together.rec_KB[:, row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.latent.kl[0], together.latent.kl[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.latent.z[:, 0], together.latent.z[:, row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("encoder", "bidirectional"), ENCODERS)
@torch.no_grad()
def test_what_stands_in_the_padding_is_never_read(encoder: str, bidirectional: bool) -> None:
    vae = make_vae(encoder, "transformer", bidirectional=bidirectional)
    batch = make_batch([3, 9, 1, 6])
    junk_BT = batch.tokens_BT.masked_fill(batch.tokens_BT == PAD_ID, 17)
    assert not torch.equal(junk_BT, batch.tokens_BT)
    clean, junk = (vae(b, RNG) for b in (batch, dataclasses.replace(batch, tokens_BT=junk_BT)))
    torch.testing.assert_close(junk.mean_RD, clean.mean_RD, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(junk.rec_KB, clean.rec_KB, atol=1e-5, rtol=1e-6)


@torch.no_grad()
def test_the_bidirectional_encoder_is_torchs_own_on_packed_sequences() -> None:
    torch.manual_seed(0)
    encoder = LstmEncoder(LstmConfig(hidden_dim=6), ModelConfig(embedding_dim=4, bidirectional=True))
    reference = nn.LSTM(4, 6, batch_first=True, bidirectional=True)
    assert encoder.backward_lstm is not None
    for name, weight in encoder.forward_lstm.named_parameters():
        getattr(reference, name).copy_(weight)
        getattr(reference, f"{name}_reverse").copy_(getattr(encoder.backward_lstm, name))
    lengths_B, x_BTE = torch.tensor([5, 1, 9, 2]), torch.randn(4, 9, 4)
    packed = nn.utils.rnn.pack_padded_sequence(x_BTE, lengths_B, batch_first=True, enforce_sorted=False)
    _, (hidden, _) = reference(packed)
    torch.testing.assert_close(encoder(x_BTE, lengths_B), torch.cat([hidden[0], hidden[1]], -1), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_encoder_reads_the_whole_sequence() -> None:
    for encoder, bidirectional in ENCODERS:
        vae, batch = make_vae(encoder, bidirectional=bidirectional), make_batch([6])
        mean = vae(batch, RNG).mean_RD
        for position in range(6):
            tokens_BT = batch.tokens_BT.clone()
            tokens_BT[0, position] = 4 + (tokens_BT[0, position] - 3) % (VOCAB - 4)
            changed = vae(dataclasses.replace(batch, tokens_BT=tokens_BT), RNG).mean_RD
            assert (changed - mean).abs().max() > 1e-6


@pytest.mark.parametrize("encoder", ["lstm", "transformer"])
@pytest.mark.parametrize("decoder", ["lstm", "transformer"])
def test_gradients_of_the_whole_objective_against_finite_differences(encoder: str, decoder: str) -> None:
    vae = make_vae(encoder, decoder, bidirectional=encoder == "lstm").double().train()
    objective = NegativeElbo(vae, ObjectiveConfig(free_bits_nats=0.05), autocast=None)
    batch = make_batch([4, 1, 6])
    batch = dataclasses.replace(batch, weight_B=torch.tensor([0.5, 2.0, 1.0]))
    beta, scale = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return objective(batch, RNG, beta, scale)[0]

    value = loss()
    assert value.dtype == torch.float64
    value.backward()
    step, generator = 1e-6, torch.Generator().manual_seed(0)
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.sub_(direction, alpha=2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
        expected = (above - below) / (2 * step)
        torch.testing.assert_close((parameter.grad * direction).sum(), expected, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradient(dropout: float) -> None:
    gradients = []
    for recompute in (False, True):
        vae = make_vae("transformer", "transformer", dropout=dropout, activation_checkpointing=recompute).train()
        torch.manual_seed(7)
        output = vae(make_batch([5, 8, 2]), RNG)
        (output.rec_KB.sum() + output.latent.kl.sum()).backward()
        gradients.append({name: p.grad for name, p in vae.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_tied_embeddings_share_storage_and_count_once() -> None:
    tied, untied = make_vae(tie_embeddings=True), make_vae(tie_embeddings=False)
    assert tied._output_weight().data_ptr() == tied.embedding.weight.data_ptr()
    assert untied._output_weight().data_ptr() != untied.embedding.weight.data_ptr()
    assert count_parameters(untied) - count_parameters(tied) == VOCAB * 10
    assert "output_weight" not in tied.state_dict()
    by_hand = (
        VOCAB * 10 + VOCAB + 10 * 12  # embedding, output bias, to_embedding
        + 2 * 4 * 12 * (10 + 12 + 2)  # two LSTMs
        + 12 * 10 + 10  # posterior
        + 5 * 10 + 5 * 12 + 12  # z to input and to cell
    )  # fmt: skip
    assert count_parameters(tied) == by_hand
    tied.output_bias.requires_grad_(False)
    assert count_parameters(tied) == by_hand - VOCAB


def test_a_tied_matrix_gets_the_gradient_of_both_uses() -> None:
    gradients = {}
    for tie in (True, False):
        vae = make_vae(tie_embeddings=tie)
        if vae.output_weight is not None:
            twin = make_vae(tie_embeddings=True)
            vae.load_state_dict(twin.state_dict(), strict=False)
            with torch.no_grad():
                vae.output_weight.copy_(vae.embedding.weight)
        vae(make_batch([5, 3]), RNG).rec_KB.sum().backward()
        gradients[tie] = vae.embedding.weight.grad
        if vae.output_weight is not None:
            gradients[tie] = vae.embedding.weight.grad + vae.output_weight.grad
    torch.testing.assert_close(gradients[True], gradients[False], atol=1e-5, rtol=1e-5)


def test_word_dropout_replaces_about_its_share_and_never_bos_or_padding() -> None:
    vae = make_vae(word_dropout=0.3).train()
    batch = make_batch([40, 13] * 200)
    plain_BT = F.pad(batch.tokens_BT[:, :-1], (1, 0), value=BOS_ID)
    with torch.no_grad():
        # Each word's embedding begins with its number.
        vae.embedding.weight[:, 0] = torch.arange(len(vae.embedding.weight))
    dropped_BT = vae._decoder_input(batch, RNG)[..., 0].long()
    fixed = (plain_BT == BOS_ID) | (plain_BT == PAD_ID)
    assert torch.equal(dropped_BT[fixed], plain_BT[fixed])
    replaced = dropped_BT[~fixed] == UNK_ID
    # Five standard errors.
    assert abs(float(replaced.float().mean()) - 0.3) < 5 * (0.21 / replaced.numel()) ** 0.5
    assert torch.equal(dropped_BT[~fixed][~replaced], plain_BT[~fixed][~replaced])
    assert torch.equal(vae.eval()._decoder_input(batch, RNG)[..., 0].long(), plain_BT)


def test_word_dropout_follows_the_sequence_and_the_step_not_the_batch() -> None:
    vae = make_vae(word_dropout=0.5).train()
    batch = make_batch([30, 12, 25], first_id=77)
    together = vae._decoder_input(batch, RNG)
    for row in range(3):
        alone = vae._decoder_input(row_of(batch, row), RNG)
        assert torch.equal(alone[0], together[row, : alone.shape[1]])
    assert not torch.equal(vae._decoder_input(batch, torch.tensor([3, 6])), together)
    renamed = dataclasses.replace(batch, sample_id_B=batch.sample_id_B + 1)
    assert not torch.equal(vae._decoder_input(renamed, RNG), together)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    vae, batch = make_vae(dropout=0.4), make_batch([6, 6])
    assert torch.equal(vae(batch, RNG).rec_KB, vae(batch, RNG).rec_KB)
    vae.train()
    assert not torch.equal(vae(batch, RNG).rec_KB, vae(batch, RNG).rec_KB)


@torch.no_grad()
def test_noise_depends_on_the_key_the_sequence_and_the_stream_alone() -> None:
    vae, batch = make_vae(), make_batch([5, 4, 7])
    output = vae(batch, RNG, num_samples=3)
    noise_KBD = (output.latent.z - output.mean_RD) / (output.logvar_RD / 2).exp()
    shuffled = dataclasses.replace(batch, sample_id_B=batch.sample_id_B.flip(0))
    other = vae(shuffled, RNG, num_samples=2)
    other_KBD = (other.latent.z - other.mean_RD) / (other.logvar_RD / 2).exp()
    torch.testing.assert_close(other_KBD, noise_KBD[:2].flip(1), atol=1e-4, rtol=1e-4)
    assert len({round(float(v), 4) for v in noise_KBD.flatten()}) == noise_KBD.numel()
    for changed in (vae(batch, torch.tensor([4, 5])), vae(batch, torch.tensor([3, 6])), vae(batch, RNG, stream=2)):
        assert (changed.latent.z[0] - output.latent.z[0]).abs().min() > 0


@torch.no_grad()
def test_each_importance_sample_is_scored_with_its_own_latent() -> None:
    vae, batch = make_vae(), make_batch([5, 4])
    output: VaeOutput = vae(batch, RNG, num_samples=3)
    for k in range(3):
        given = vae(batch, RNG, z=output.latent.z[k])
        torch.testing.assert_close(given.rec_KB[0], output.rec_KB[k], atol=1e-5, rtol=1e-5)
    weighted = vae(batch, RNG, weight_B=torch.tensor([0.5, 2.0]))
    expected = 0.5 * output.rec_KB[0, 0] + 2.0 * output.rec_KB[0, 1]
    torch.testing.assert_close(weighted.weighted_rec, expected, atol=1e-5, rtol=1e-5)
