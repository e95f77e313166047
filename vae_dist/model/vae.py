"""The text VAE: embedding, encoder, diagonal Gaussian posterior, standard normal prior, decoder, softmax.

Shapes: B sequences, T positions, N real tokens, E embedding, D latent, K samples, V vocabulary.

Everything that touches a weight happens inside `forward` or a submodule's `forward`, because ZeRO-3 gathers
parameters only there; evaluation calls `forward` too.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from vae_dist.config.schema import LstmConfig, ModelConfig, TransformerConfig
from vae_dist.data.stream.batch import Batch
from vae_dist.data.text.special_ids import BOS_ID, PAD_ID, UNK_ID
from vae_dist.model.lstm import LstmDecoder, LstmEncoder
from vae_dist.model.transformer import TransformerDecoder, TransformerEncoder
from vae_kernels import GaussianSample, embedding_word_dropout, gaussian_rsample_kl, linear_cross_entropy

LATENT_STREAM = 0
WORD_DROPOUT_STREAM = 1


class VaeOutput(NamedTuple):
    """What one pass over a batch gives.

    Attributes:
        weighted_rec: scalar, sum of weight_B * rec of the first sample, differentiable.
        rec_KB: float32 [K, B], -log p(x | z_k) in nats, summed over the sequence's tokens.
        latent: z, KL and densities, see `vae_kernels.gaussian_rsample_kl`.
        mean_BD, logvar_BD: the posterior.
    """

    weighted_rec: torch.Tensor
    rec_KB: torch.Tensor
    latent: GaussianSample
    mean_BD: torch.Tensor
    logvar_BD: torch.Tensor


class TextVAE(nn.Module):
    """Composed of an encoder, a posterior, a decoder and an output projection."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, *, kernels: str = "auto", activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.kernels = config, vocab_size, kernels
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        self.encoder = _build_encoder(config, activation_checkpointing)
        self.posterior = nn.Linear(self.encoder.output_dim, 2 * config.latent_dim)
        self.decoder = _build_decoder(config, activation_checkpointing)
        self.to_embedding = nn.Linear(self.decoder.output_dim, config.embedding_dim, bias=False)
        self.output_weight = (
            None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.embedding_dim))
        )
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    def forward(
        self,
        batch: Batch,
        rng: torch.Tensor,
        *,
        num_samples: int = 1,
        free_bits: float = 0.0,
        weight_B: torch.Tensor | None = None,
        z_BD: torch.Tensor | None = None,
        stream: int = LATENT_STREAM,
    ) -> VaeOutput:
        """Encode, sample, decode, and score the batch.

        Args:
            batch: padded sequences.
            rng: int64[2], (seed, step): the key of all noise.
            num_samples: K. Training uses 1.
            free_bits: nats per dimension, see `gaussian_rsample_kl`.
            weight_B: float32, weight of each sequence in `weighted_rec`; default `batch.weight_B`.
            z_BD: decode these latents instead of sampling (then K = 1).
            stream: tag of the latent noise, so that evaluation never repeats training's noise.
        """
        mean_BD, logvar_BD = self.encode(batch.tokens_BT, batch.lengths_B)
        latent = gaussian_rsample_kl(
            mean_BD,
            logvar_BD,
            rng,
            batch.sample_id_B,
            num_samples=num_samples,
            free_bits=free_bits,
            stream=stream,
            backend=self.kernels,
        )
        z_KBD = latent.z if z_BD is None else z_BD[None]
        weight_B = batch.weight_B if weight_B is None else weight_B
        weighted, rec = zip(*(self._score(batch, z, rng, weight_B) for z in z_KBD), strict=True)
        return VaeOutput(weighted[0], torch.stack(rec), latent, mean_BD, logvar_BD)

    def encode(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of q(z | x), float32 (float64 in a float64 model) [B, D] each."""
        parameters = self.posterior(self.encoder(self.dropout(self.embedding(tokens_BT)), lengths_B))
        wide = torch.promote_types(parameters.dtype, torch.float32)
        mean_BD, logvar_BD = parameters.to(wide).chunk(2, dim=-1)
        return mean_BD, logvar_BD

    def step(self, tokens_B: torch.Tensor, z_BD: torch.Tensor, state: Any, position: int) -> tuple[torch.Tensor, Any]:
        """Logits of the next token, float32 [B, V], and the decoder's next state (from `decoder.start`)."""
        hidden, state = self.decoder.step(self.embedding(tokens_B), z_BD, state, position)
        logits = F.linear(self.to_embedding(hidden), self._output_weight(), self.output_bias)
        return logits.float(), state

    def _score(
        self, batch: Batch, z_BD: torch.Tensor, rng: torch.Tensor, weight_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_BTE = self.dropout(self._decoder_input(batch, rng))
        hidden = self.decoder(x_BTE, z_BD.to(x_BTE.dtype), batch.lengths_B)
        hidden_NE = self.to_embedding(self.dropout(hidden.flatten(0, 1).index_select(0, batch.valid_N)))
        scored = linear_cross_entropy(
            hidden_NE,
            self._output_weight(),
            batch.tokens_BT.flatten().index_select(0, batch.valid_N),
            bias=self.output_bias,
            cu_seqlens=batch.offsets_B1,
            weight_per_sequence=weight_B,
            backend=self.kernels,
        )
        return cast(tuple[torch.Tensor, torch.Tensor], scored)

    def _decoder_input(self, batch: Batch, rng: torch.Tensor) -> torch.Tensor:
        """The tokens moved right behind BOS, embedded; while training some of them as <unk> (word dropout)."""
        return embedding_word_dropout(
            F.pad(batch.tokens_BT[:, :-1], (1, 0), value=BOS_ID),
            self.embedding.weight,
            rng,
            batch.sample_id_B,
            rate=self.config.word_dropout if self.training else 0.0,
            unk_id=UNK_ID,
            keep_ids=(BOS_ID, PAD_ID),
            stream=WORD_DROPOUT_STREAM,
            backend=self.kernels,
        )

    def _output_weight(self) -> torch.Tensor:
        return self.embedding.weight if self.output_weight is None else self.output_weight

    def _initialise(self) -> None:
        """Embeddings have rows of about unit norm; LSTMs keep torch's uniform start.

        Their forget gates open with a bias of 1, so that gradients reach far back from the first step
        (Jozefowicz et al. 2015).
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.embedding_dim**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LSTM):
                for layer in range(module.num_layers):
                    bias = getattr(module, f"bias_ih_l{layer}")
                    nn.init.ones_(bias[module.hidden_size : 2 * module.hidden_size])
        if self.output_weight is not None:
            nn.init.normal_(self.output_weight, std=self.config.embedding_dim**-0.5)


def count_parameters(model: nn.Module) -> int:
    """Trainable scalars; a tied matrix counts once. Under ZeRO-3 the full size, not the local shard."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def _build_encoder(config: ModelConfig, recompute: bool) -> LstmEncoder | TransformerEncoder:
    part = config.encoder
    if isinstance(part, LstmConfig):
        return LstmEncoder(part, config.embedding_dim, config.bidirectional, config.dropout)
    return TransformerEncoder(part, config.embedding_dim, config.dropout, recompute)


def _build_decoder(config: ModelConfig, recompute: bool) -> LstmDecoder | TransformerDecoder:
    part = config.decoder
    shape = (config.embedding_dim, config.latent_dim, config.injection, config.dropout)
    if isinstance(part, LstmConfig):
        return LstmDecoder(part, *shape)
    assert isinstance(part, TransformerConfig)
    return TransformerDecoder(part, *shape, recompute)
