"""Encoders and decoders of `transformers`: the package's own hidden states, steps like teacher forcing, gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoints import (
    KINDS,
    POSITIONS,
    TOKENIZER,
    WIDTH,
    both_ids,
    huggingface_model,
    make_batch,
    make_config,
    make_vae,
    part,
    transformers,
    write_checkpoints,
)
from torch import nn

from vae_dist.config.model_schema import HuggingFaceConfig
from vae_dist.config.objective_schema import ObjectiveConfig
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import collate
from vae_dist.data.text.special_ids import BOS_ID
from vae_dist.errors import ConfigError
from vae_dist.model.huggingface_checkpoint import require_positions, start_from_checkpoints
from vae_dist.objective.elbo import NegativeElbo

RNG = torch.tensor([3, 5])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory)


def base_outputs(kind: str, ids_BT: torch.Tensor, **changes: Any) -> torch.Tensor:
    """The hidden states of the package's own model, which reads its own ids."""
    model = huggingface_model(kind)
    model.config.is_decoder = changes.pop("is_decoder", False)
    return model.base_model(input_ids=ids_BT, use_cache=False, **changes).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_encoder_gives_the_checkpoints_own_hidden_states(checkpoints: dict[str, Path], kind: str) -> None:
    ours_BT, theirs_BT = both_ids(3, 9)
    lengths_B = torch.tensor([9, 4, 1])
    real_BT = torch.arange(9) < lengths_B[:, None]
    expected_BTW = base_outputs(kind, theirs_BT, attention_mask=real_BT.long())
    vae = make_vae(encoder=part(checkpoints[kind]))
    mean_BW = torch.stack([expected_BTW[b, :n].double().mean(0) for b, n in enumerate(lengths_B.tolist())])
    got_BW = vae.encoder(vae.embedding(ours_BT), lengths_B)
    torch.testing.assert_close(got_BW.double(), mean_BW, atol=1e-6, rtol=1e-5)
    per_token = make_vae(encoder=part(checkpoints[kind]), latent="token", injection="embedding")
    got_BTW = per_token.encoder(per_token.embedding(ours_BT), lengths_B)
    torch.testing.assert_close(got_BTW[real_BT], expected_BTW[real_BT], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_decoder_without_a_latent_is_the_checkpoints_language_model(checkpoints: dict[str, Path], kind: str) -> None:
    ours_BT, theirs_BT = both_ids(3, 9)
    reference = huggingface_model(kind)(input_ids=theirs_BT)
    for tied in (True, False):
        vae = make_vae(decoder=part(checkpoints[kind]), latent="none", tie_embeddings=tied)
        hidden = vae.decoder(vae.embedding(ours_BT), torch.zeros(3, 0), torch.full((3,), 9))
        torch.testing.assert_close(hidden, base_outputs(kind, theirs_BT), atol=1e-6, rtol=1e-5)
        if tied and kind == "llama":
            continue
        logits_BTV = F.linear(vae.to_embedding(hidden), vae._output_weight(), vae.output_bias)
        expected = reference.logits.gather(2, theirs_BT[:, None].expand(-1, 9, -1))
        got = logits_BTV.gather(2, ours_BT[:, None].expand(-1, 9, -1))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bert_reads_from_left_to_right_as_a_decoder(checkpoints: dict[str, Path]) -> None:
    ours_BT, theirs_BT = both_ids(2, 7)
    vae = make_vae(decoder=part(checkpoints["bert"]), latent="none")
    model = transformers.BertLMHeadModel.from_pretrained(checkpoints["bert"], is_decoder=True).eval()
    expected = model.base_model(input_ids=theirs_BT).last_hidden_state
    got = vae.decoder(vae.embedding(ours_BT), torch.zeros(2, 0), torch.tensor([7, 7]))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert (got - base_outputs("bert", theirs_BT)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_latent_is_added_to_the_embeddings_or_stands_before_them(checkpoints: dict[str, Path], kind: str) -> None:
    ours_BT, theirs_BT = both_ids(2, 6)
    model, z_BD = huggingface_model(kind), torch.randn(2, 5)
    model.config.is_decoder = True
    if kind == "bert":
        model = transformers.BertLMHeadModel.from_pretrained(checkpoints["bert"], is_decoder=True).eval()
    for injection in ("embedding", "memory", "both"):
        vae = make_vae(decoder=part(checkpoints[kind]), injection=injection)
        x_BTE = model.get_input_embeddings()(theirs_BT)
        if injection != "memory":
            x_BTE = x_BTE + (z_BD @ vae.decoder.to_input.weight.T)[:, None]
        if injection != "embedding":
            prefix_BE = z_BD @ vae.decoder.to_prefix.weight.T + vae.decoder.to_prefix.bias
            x_BTE = torch.cat([prefix_BE[:, None], x_BTE], dim=1)
        expected = model.base_model(inputs_embeds=x_BTE).last_hidden_state[:, -6:]
        got = vae.decoder(vae.embedding(ours_BT), z_BD, torch.tensor([6, 6]))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("injection", ["embedding", "memory", "both"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_stepping_equals_teacher_forcing(checkpoints: dict[str, Path], kind: str, injection: str) -> None:
    vae = make_vae(decoder=part(checkpoints[kind]), injection=injection)
    batch, z_BD = make_batch([7, 4, 1]), torch.randn(3, 5)
    rec_B = vae(batch, RNG, z=z_BD).rec_KB[0].double()
    state, nll_B = vae.decoder.new_state(3, 7), torch.zeros(3).double()
    # Rows begin at different times.
    for time in range(vae.decoder.first_position, 11):
        position_B = torch.tensor([time, time - 3, time - 1]).clamp(vae.decoder.first_position, 7)
        before_B = (position_B - 1).clamp(min=0)[:, None]
        token_B = torch.where(position_B > 0, batch.tokens_BT.gather(1, before_B)[:, 0], BOS_ID)
        logits_BV = vae.step(token_B, z_BD, state, position_B.clamp(max=6), 7)
        target_B = batch.tokens_BT.gather(1, position_B.clamp(0, 6)[:, None])[:, 0]
        loss_B = F.cross_entropy(logits_BV.double(), target_B, reduction="none")
        written_B = (time >= torch.tensor([0, 3, 1])) & (position_B < batch.lengths_B)
        nll_B += torch.where(written_B, loss_B, 0.0)
    torch.testing.assert_close(rec_B, nll_B, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_stepping_with_a_latent_for_every_token_equals_teacher_forcing(checkpoints: dict[str, Path]) -> None:
    vae = make_vae(decoder=part(checkpoints["qwen2"]), latent="token", injection="embedding")
    batch, z_BTD = make_batch([6, 6]), torch.randn(2, 6, 5)
    x_BTE = vae.embedding(F.pad(batch.tokens_BT[:, :-1], (1, 0), value=BOS_ID))
    expected = vae.decoder(x_BTE, z_BTD, batch.lengths_B)
    state, hidden = vae.decoder.new_state(2, 6), []
    for position in range(6):
        position_B = torch.full((2,), position)
        hidden.append(vae.decoder.step(x_BTE[:, position], z_BTD[:, position], state, position_B, 6))
    torch.testing.assert_close(torch.stack(hidden, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_decoder_hears_no_later_token_and_the_latent_everywhere(checkpoints: dict[str, Path], kind: str) -> None:
    decoder = make_vae(decoder=part(checkpoints[kind])).decoder
    x_BTE, z_BD, lengths_B = torch.randn(2, 8, WIDTH), torch.randn(2, 5), torch.tensor([8, 8])
    before = decoder(x_BTE, z_BD, lengths_B)
    for changed in (1, 4, 7):
        other_BTE = x_BTE.clone()
        other_BTE[:, changed] += torch.randn(WIDTH)
        change = (decoder(other_BTE, z_BD, lengths_B) - before).abs().amax(-1)
        assert change[:, :changed].max() < 1e-5 and change[:, changed:].min() > 1e-4
    assert (decoder(x_BTE, z_BD.flip(0), lengths_B) - before).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_and_company_change_nothing(checkpoints: dict[str, Path], kind: str) -> None:
    vae = make_vae(encoder=part(checkpoints[kind]), decoder=part(checkpoints["gpt2"]))
    batch = make_batch([9, 3, 1, 6])
    junk_BT = torch.where(batch.tokens_BT == 0, 5, batch.tokens_BT)
    clean, junk = vae(batch, RNG), vae(dataclasses.replace(batch, tokens_BT=junk_BT), RNG)
    torch.testing.assert_close(junk.mean_RD, clean.mean_RD, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(junk.rec_KB, clean.rec_KB, atol=1e-5, rtol=1e-6)
    for row in range(4):
        tokens = batch.tokens_BT[row, : batch.lengths_B[row]].numpy()
        alone = vae(collate(Sequences.from_list([tokens]), np.array([row])), RNG)
        torch.testing.assert_close(alone.mean_RD[0], clean.mean_RD[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.rec_KB[0, 0], clean.rec_KB[0, row], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("injection", ["embedding", "both"])
@pytest.mark.parametrize(("encoder", "decoder"), [("bert", "gpt2"), ("qwen3", "llama")])
def test_every_weight_gets_its_gradient(
    checkpoints: dict[str, Path], encoder: str, decoder: str, injection: str
) -> None:
    vae = make_vae(encoder=part(checkpoints[encoder]), decoder=part(checkpoints[decoder]), injection=injection)
    objective = NegativeElbo(vae, ObjectiveConfig(), autocast=None)
    batch, one = make_batch([5, 2, 7]), torch.tensor(1.0)

    def loss() -> torch.Tensor:
        return objective(batch, RNG, one, one)[0]

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # All at once, in fp32: the slope along a random direction.
    parameters = list(vae.parameters())
    directions = [torch.randn(p.shape, generator=generator) for p in parameters]
    expected = sum(float((p.grad.double() * d.double()).sum()) for p, d in zip(parameters, directions, strict=True))
    step, values = 1e-3, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * step)
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradient(checkpoints: dict[str, Path], dropout: float) -> None:
    gradients, kept = [], []
    for recompute in (False, True):
        parts = {"encoder": part(checkpoints["bert"]), "decoder": part(checkpoints["qwen3"])}
        vae = make_vae(recompute=recompute, dropout=dropout, **parts).train()
        torch.manual_seed(7)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, numbers=saved: numbers.append(x.numel()) or x, lambda x: x
        ):
            output = vae(make_batch([5, 8, 2]), RNG)
        (output.rec_KB.sum() + output.latent.kl.sum()).backward()
        gradients.append({name: p.grad for name, p in vae.named_parameters()})
        kept.append(sum(saved))
    assert kept[1] < 0.5 * kept[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_the_models_and_not_the_checkpoints(checkpoints: dict[str, Path], kind: str) -> None:
    inside = {}
    for dropout in (0.0, 0.4):
        vae = make_vae(encoder=part(checkpoints[kind]), dropout=dropout).train()
        backbone = vae.encoder.model
        rates = {m.p for m in backbone.modules() if isinstance(m, nn.Dropout)}
        rates |= {layer.self_attn.attention_dropout for layer in getattr(backbone, "layers", ())}
        assert rates <= {0.0, dropout} and dropout in rates
        x_BTE, lengths_B = torch.randn(2, 6, WIDTH), torch.tensor([6, 6])
        inside[dropout] = torch.equal(vae.encoder(x_BTE, lengths_B), vae.encoder(x_BTE, lengths_B))
        vae.eval()
        assert torch.equal(vae.encoder(x_BTE, lengths_B), vae.encoder(x_BTE, lengths_B))
    assert inside == {0.0: True, 0.4: False}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_steps_of_the_optimizer_reduce_the_loss(checkpoints: dict[str, Path], autocast: torch.dtype | None) -> None:
    parts = {"encoder": part(checkpoints["bert"]), "decoder": part(checkpoints["qwen2"])}
    objective = NegativeElbo(make_vae(recompute=True, **parts).train(), ObjectiveConfig(), autocast=autocast)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    batch, one = make_batch([6, 9, 4, 8]), torch.tensor(1.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(batch, RNG, one, one)[0]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_bf16_autocast_stays_near_fp32(checkpoints: dict[str, Path]) -> None:
    vae, batch = make_vae(encoder=part(checkpoints["bert"]), decoder=part(checkpoints["llama"])), make_batch([6, 9, 4])
    exact = vae(batch, RNG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = vae(batch, RNG)
    torch.testing.assert_close(rounded.rec_KB.float(), exact.rec_KB, atol=0.5, rtol=0.05)
    assert rounded.mean_RD.dtype == torch.float32
    assert not torch.equal(rounded.rec_KB, exact.rec_KB)


@torch.no_grad()
def test_an_architecture_without_a_checkpoint_starts_from_the_seed() -> None:
    values = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1,
              "num_attention_heads": 2, "vocab_size": 8}  # fmt: skip
    decoder = HuggingFaceConfig(architecture=values)
    first, again = make_vae(decoder=decoder), make_vae(decoder=decoder)
    batch = make_batch([5, 3])
    assert torch.equal(first(batch, RNG).rec_KB, again(batch, RNG).rec_KB)
    assert start_from_checkpoints(first, TOKENIZER) == []
    assert sum(p.numel() for p in first.decoder.model.parameters()) == 4 * WIDTH**2 + 3 * 24 * WIDTH + 3 * WIDTH


def test_sequences_beyond_the_models_positions_are_refused(checkpoints: dict[str, Path]) -> None:
    config = make_config(encoder=part(checkpoints["bert"]), decoder=part(checkpoints["gpt2"]), injection="memory")
    require_positions(config, POSITIONS - 1)
    for tokens, where, positions in ((POSITIONS, "decoder", POSITIONS + 1), (POSITIONS + 1, "encoder", POSITIONS + 1)):
        with pytest.raises(ConfigError, match=rf"of {positions} positions .* model\.{where}, which has {POSITIONS}"):
            require_positions(config, tokens)
    vae = make_vae(encoder=part(checkpoints["bert"]), decoder=part(checkpoints["gpt2"]), injection="memory")
    with pytest.raises(ConfigError, match=r"model\.decoder, which has 24"):
        vae.decoder.new_state(1, POSITIONS)
    with pytest.raises(ConfigError, match=r"model\.encoder, which has 24"):
        vae(make_batch([POSITIONS + 1]), RNG)
