"""FLOPs and activation bytes that are predicted without data, against a real step of the same model on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import vae_dist.model.vae as vae_module
from vae_dist.config.load import load_config
from vae_dist.config.schema import Config
from vae_dist.data.stream.batch import Batch
from vae_dist.estimate.trace import Cost, Shape, micro_batch_cost
from vae_dist.model.vae import TextVAE
from vae_dist.objective.elbo import NegativeElbo

VOCAB, SHAPE = 600, Shape(sequences=16, tokens=24)
SIZE = ["model.embedding_dim=128", "model.latent_dim=16", "objective.free_bits=none"]
LSTM = ["model.encoder={kind: lstm, hidden_dim: 160}", "model.decoder={kind: lstm, hidden_dim: 192}"]
PART = "{kind: transformer, hidden_dim: 128, num_layers: 3, num_heads: 4}"
TRANSFORMER = [f"model.encoder={PART}", f"model.decoder={PART}"]
BERT = "{model_type: bert, hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 256}"
GPT2 = "{model_type: gpt2, n_embd: 128, n_layer: 2, n_head: 2}"
LLAMA = (
    "{model_type: llama, hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
    "intermediate_size: 256}"
)
CASES = {
    "lstm": LSTM,
    "lstm of two layers in both directions": [
        "model.encoder={kind: lstm, hidden_dim: 160, num_layers: 2}", LSTM[1], "model.bidirectional=true",
        "model.dropout=0.2",
    ],
    "lstm, frozen embeddings, untied": [*LSTM, "model.freeze_embeddings=true", "model.tie_embeddings=false"],
    "a latent a token": [*LSTM, "model.latent=token", "model.injection=embedding", "model.teacher_forcing=false"],
    "no latent": [*LSTM, "model.latent=none"],
    "three importance samples": [*LSTM, "objective.importance_samples=3"],
    "transformer": TRANSFORMER,
    "transformer, z in every layer": [*TRANSFORMER, "model.injection=layers"],
    "transformer, recomputed": [*TRANSFORMER, "train.activation_checkpointing=true"],
    "bag of words": ["model.encoder={kind: bag_of_words}", "model.decoder={kind: bag_of_words}"],
    "vmf": [*LSTM, "model.posterior={kind: vmf}"],
    "vamp prior": [*LSTM, "model.prior={kind: vamp}"],
    "flow prior": [*LSTM, "model.prior={kind: flow}"],
    "mixture prior": [*LSTM, "model.prior={kind: mixture}"],
    "bert and gpt2": [
        f"model.encoder={{kind: huggingface, architecture: {BERT}}}",
        f"model.decoder={{kind: huggingface, architecture: {GPT2}}}",
    ],
    "llama, recomputed": [
        LSTM[0], f"model.decoder={{kind: huggingface, architecture: {LLAMA}}}", "train.activation_checkpointing=true",
    ],
}  # fmt: skip


def predicted(config: Config, autocast: torch.dtype | None = None, shape: Shape = SHAPE) -> Cost:
    return micro_batch_cost(config, VOCAB, shape, autocast, gpu=False)


class RealStep:
    """One micro-batch of the training objective with data."""

    def __init__(self, config: Config, autocast: torch.dtype | None, shape: Shape = SHAPE) -> None:
        torch.manual_seed(0)
        self.objective = NegativeElbo(
            TextVAE(
                config.model, VOCAB, kernels="torch", activation_checkpointing=config.train.activation_checkpointing
            ),
            config.objective,
            autocast,
        ).train()
        sequences, tokens = shape
        self.batch = Batch(
            tokens_BT=torch.randint(4, VOCAB, shape),
            lengths_B=torch.full((sequences,), tokens),
            weight_B=torch.ones(sequences),
            sample_id_B=torch.arange(sequences),
            valid_N=torch.arange(sequences * tokens),
            offsets_B1=torch.arange(sequences + 1) * tokens,
        )

    def forward(self) -> torch.Tensor:
        one = torch.ones(())
        loss, _ = self.objective(self.batch, torch.tensor([0, 1]), one, one / len(self.batch.lengths_B), one)
        return loss

    def given(self) -> set[int]:
        """Addresses of what a step does not make."""
        tensors = [*self.objective.parameters(), *self.objective.buffers(), *vars(self.batch).values()]
        return {t.untyped_storage().data_ptr() for t in tensors}


def plain_loss(x: Any, weight: Any, target: Any, *, bias: Any, weight_per_sequence: Any, **_: Any) -> Any:
    """What the fused loss computes for sequences of one length, in torch's own operators."""
    nll_B = F.cross_entropy(F.linear(x, weight, bias), target, reduction="none").view(-1, SHAPE.tokens).sum(1)
    return nll_B if weight_per_sequence is None else ((nll_B * weight_per_sequence).sum(), nll_B.detach())


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_of_torchs_counter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [*SIZE, *CASES[case]])
    cost = predicted(config)
    monkeypatch.setattr(vae_module, "linear_cross_entropy", plain_loss)
    step = RealStep(config, None)
    counter = FlopCounterMode(display=False)
    # The counter knows neither oneDNN's LSTM nor the CPU's flash attention: these run as plain products.
    with counter, torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
        loss = step.forward()
        forward = counter.get_total_flops()
        loss.backward()
    backward = counter.get_total_flops() - forward
    assert cost.forward_flops == pytest.approx(forward, rel=0.01)
    assert cost.backward_flops + cost.recompute_flops == pytest.approx(backward, rel=0.01)
    assert (cost.recompute_flops > 0) == ("recomputed" in case)
    assert forward > 2 * 128 * VOCAB * SHAPE.sequences * SHAPE.tokens


def kept_for_backward(step: RealStep) -> int:
    """Bytes of the storages that autograd saves in forward, besides parameters and the batch."""
    saved: dict[int, int] = {}
    given = step.given()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.forward()
    total = sum(saved.values())
    loss.backward()
    return total


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_activation_bytes_are_those_that_autograd_keeps(case: str, precision: str) -> None:
    config = load_config(None, [*SIZE, *CASES[case]])
    autocast = torch.bfloat16 if precision == "bf16" else None
    measured = kept_for_backward(RealStep(config, autocast))
    cost = predicted(config, autocast)
    print(f"{case}, {precision}: kept {cost.kept_bytes:,} predicted, {measured:,} measured")
    assert cost.kept_bytes == pytest.approx(measured, rel=0.2)


def most_at_once(step: RealStep) -> int:
    """Bytes of the CPU's allocator at their most, above those at the start, in a step that finds its gradients made."""
    step.forward().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step.forward().backward()
    now = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["lstm", "transformer", "transformer, recomputed"])
def test_the_peak_is_that_of_the_allocator(case: str, precision: str) -> None:
    config, shape = load_config(None, [*SIZE, *CASES[case]]), Shape(sequences=64, tokens=32)
    autocast = torch.bfloat16 if precision == "bf16" else None
    measured = most_at_once(RealStep(config, autocast, shape))
    cost = predicted(config, autocast, shape)
    print(f"{case}, {precision}: peak {cost.peak_bytes:,} predicted, {measured:,} measured")
    # Above what forward keeps there is what kernels take for themselves, which the trace does not see.
    assert cost.peak_bytes == pytest.approx(measured, rel=0.2)
