"""The text VAE: embedding, encoder, posterior, prior, decoder, softmax.

Shapes: B sequences, T positions, N real tokens, R rows with a latent each (B, or N where every token has one), E
embedding, D latent, K samples, V vocabulary.

Everything that touches a weight happens inside `forward` or a submodule's `forward`, because ZeRO-3 gathers
parameters only there; evaluation calls `forward` too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vae_dist.config.model_schema import HuggingFaceConfig, LstmConfig, ModelConfig, TransformerConfig
from vae_dist.data.stream.batch import Batch
from vae_dist.data.text.special_ids import BOS_ID, PAD_ID, UNK_ID
from vae_dist.model.bag_of_words import BagOfWordsDecoder, BagOfWordsEncoder
from vae_dist.model.dropout import SequenceDropout
from vae_dist.model.huggingface import HuggingFaceDecoder, HuggingFaceEncoder
from vae_dist.model.latent import LatentSample
from vae_dist.model.lstm import LstmDecoder, LstmEncoder
from vae_dist.model.posterior import LogPrior, build_posterior
from vae_dist.model.prior import build_prior, build_sampling_prior
from vae_dist.model.transformer import TransformerDecoder, TransformerEncoder
from vae_kernels import embedding_word_dropout, linear_cross_entropy, segment_sum

LATENT_STREAM = 0
WORD_DROPOUT_STREAM = 1
# A token's noise is named by its sequence's id times this, plus its position.
_POSITIONS = 2**20


class VaeOutput(NamedTuple):
    """What one pass over a batch gives.

    Attributes:
        weighted_rec: scalar, sum over sequences of weight_B * rec of the first sample, differentiable; None where no
            weights were given.
        rec_KB: float32 [K, B], -log p(x | z_k) in nats, summed over the sequence's tokens; differentiable where no
            weights were given.
        latent: of sequences: z [K, B, D] (or [K, B, T, D]), and the KL and densities summed over a sequence's tokens
            where every token has a latent.
        mean_RD, logvar_RD: the posterior of every row.
    """

    weighted_rec: torch.Tensor | None
    rec_KB: torch.Tensor
    latent: LatentSample
    mean_RD: torch.Tensor
    logvar_RD: torch.Tensor


class TextVAE(nn.Module):
    """Composed of an embedding, an encoder, a posterior, a prior, a decoder and an output projection.

    With `config.latent = none` it is a language model: there is no encoder, and z has no dimensions.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, *, kernels: str = "auto", activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.kernels = config, vocab_size, kernels
        self.per_token = config.latent == "token"
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        self.encoder = None if config.latent == "none" else _build_encoder(config, activation_checkpointing)
        self.posterior = None if self.encoder is None else build_posterior(config, self.encoder.output_dim)
        self.decoder = _build_decoder(config, activation_checkpointing)
        self.to_embedding = nn.Linear(self.decoder.output_dim, config.embedding_dim, bias=False)
        self.output_weight = (
            None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.embedding_dim))
        )
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = SequenceDropout(config.dropout, config.shared_dropout)
        self.prior = None if self.encoder is None else build_prior(config)
        self.sampling_prior = build_sampling_prior(config) if config.sampling_components else None
        self._initialise()
        self.embedding.weight.requires_grad_(not config.freeze_embeddings)

    @property
    def latent_dim(self) -> int:
        """D, dimensions of z; 0 in a language model."""
        return 0 if self.encoder is None else self.config.latent_dim

    @property
    def trained_prior_name(self) -> str:
        """The prior that the objective knows."""
        return "none" if self.prior is None else self.config.prior.kind

    @property
    def prior_name(self) -> str:
        """What samples are drawn from."""
        return self.trained_prior_name if self.sampling_prior is None else "fitted mixture"

    def forward(
        self,
        batch: Batch,
        rng: torch.Tensor,
        *,
        num_samples: int = 1,
        free_bits: float = 0.0,
        weight_B: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        stream: int = LATENT_STREAM,
        fitted_prior: bool = False,
        posterior_rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> VaeOutput:
        """Encode, sample, decode, and score the batch.

        Args:
            batch: padded sequences.
            rng: int64[2], (seed, step): the key of all noise.
            num_samples: K; all K decode at once.
            free_bits: nats per dimension and row, for `latent.kl_free`.
            weight_B: float32, weight of each sequence in `weighted_rec`. Given, the loss's gradient is computed in the
                forward pass (K must be 1); left out, `rec_KB` is what carries gradients.
            z: decode these latents, [B, D] or [B, T, D], instead of samples (then K = 1).
            stream: tag of the latent noise, so that evaluation never repeats training's noise.
            fitted_prior: KL and log p(z) are those of `sampling_prior`, not of the prior trained with.
            posterior_rows: `mean_RD` and `logvar_RD` of an earlier pass over the same batch, which need not be encoded
                again.
        """
        mean_RD, logvar_RD = posterior_rows or self._posterior_rows(batch)
        log_prior = self._log_prior(fitted_prior)
        latent = self._draw(batch, mean_RD, logvar_RD, rng, num_samples, free_bits, stream, log_prior)
        z_K = latent.z if z is None else z[None]
        rows = batch if len(z_K) == 1 else batch.repeated(len(z_K))
        weighted, rec = self._score(rows, z_K.flatten(0, 1), rng, weight_B)
        return VaeOutput(weighted, rec.view(len(z_K), -1), latent, mean_RD, logvar_RD)

    def encode(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of q(z | x), float32 (float64 in a float64 model): [B, D], or [B, T, D] with zeros at
        padding where every token has a latent."""
        rows = self._posterior_rows(batch)
        return (_to_positions(rows[0], batch), _to_positions(rows[1], batch)) if self.per_token else rows

    def step(
        self, tokens_B: torch.Tensor, z_BD: torch.Tensor, state: list[torch.Tensor], position_B: torch.Tensor, span: int
    ) -> torch.Tensor:
        """Logits of the next token, float32 [B, V]; the decoder's step, as `model/latent.py` has it."""
        hidden_BW = self.decoder.step(self.embedding(tokens_B), z_BD, state, position_B, span)
        return F.linear(self.to_embedding(hidden_BW), self._output_weight(), self.output_bias).float()

    def encode_embeddings(self, x_BTE: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The posterior of sequences given as embeddings, [B, D] each: what a VampPrior asks for."""
        assert self.encoder is not None and self.posterior is not None
        mean, logvar = self.posterior(self.encoder(x_BTE, lengths_B), torch.ones(len(x_BTE), device=x_BTE.device))
        return mean, logvar

    def _posterior_rows(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self.encoder is None or self.posterior is None:
            none = self.output_bias.new_zeros(len(batch.lengths_B), 0)
            return none, none
        h = self.encoder(self.dropout(self.embedding(batch.tokens_BT)), batch.lengths_B)
        weight_R = batch.weight_B
        if self.per_token:
            h, weight_R = h.flatten(0, 1).index_select(0, batch.valid_N), weight_R[batch.sequence_N]
        mean_RD, logvar_RD = self.posterior(h, weight_R)
        return mean_RD, logvar_RD

    def _draw(
        self,
        batch: Batch,
        mean_RD: torch.Tensor,
        logvar_RD: torch.Tensor,
        rng: torch.Tensor,
        num_samples: int,
        free_bits: float,
        stream: int,
        log_prior: LogPrior | None,
    ) -> LatentSample:
        """Samples and their KL, of sequences."""
        if self.posterior is None or self.prior is None:
            nothing = mean_RD.new_zeros(num_samples, len(mean_RD))
            return LatentSample(nothing[..., None][..., :0], nothing[0], nothing[0], nothing[0, :0], nothing, nothing)
        id_R = batch.sample_id_B
        if self.per_token:
            id_B = batch.sample_id_B[batch.sequence_N]
            position_N = batch.valid_N % batch.tokens_BT.shape[1]
            id_R = torch.where(id_B < 0, -1, id_B * _POSITIONS + position_N)
        sample: LatentSample = self.posterior.draw(
            mean_RD,
            logvar_RD,
            rng,
            id_R,
            num_samples=num_samples,
            free_bits=free_bits,
            stream=stream,
            backend=self.kernels,
            prior=log_prior,
        )
        return _per_sequence(sample, batch) if self.per_token else sample

    def _log_prior(self, fitted: bool) -> LogPrior | None:
        """log p(z) by the fitted mixture or the prior; None for the standard one, whose KL has a closed form."""
        prior = self.sampling_prior if fitted else self.prior
        if prior is None or (not fitted and self.config.prior.kind == "standard"):
            return None
        return lambda z_RD: prior(z_RD, self.encode_embeddings)

    def _score(
        self, batch: Batch, z: torch.Tensor, rng: torch.Tensor, weight_B: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        x_BTE = self.dropout(self._decoder_input(batch, rng))
        hidden_BTH = self.dropout(self.decoder(x_BTE, z.to(x_BTE.dtype), batch.lengths_B))
        hidden_NE = self.to_embedding(hidden_BTH.flatten(0, 1).index_select(0, batch.valid_N))
        scored = linear_cross_entropy(
            hidden_NE,
            self._output_weight(),
            batch.tokens_BT.flatten().index_select(0, batch.valid_N),
            bias=self.output_bias,
            cu_seqlens=batch.offsets_B1,
            reduction="none" if weight_B is not None else "sequence",
            weight_per_sequence=weight_B,
            backend=self.kernels,
        )
        return (None, scored) if isinstance(scored, torch.Tensor) else scored

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
        (Jozefowicz et al. 2015). Priors start as they say themselves.
        """
        for module in self._text_modules():
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

    def _text_modules(self) -> Iterable[nn.Module]:
        parts = (self.embedding, self.encoder, self.posterior, self.decoder, self.to_embedding)
        return (module for part in parts if part is not None for module in part.modules())


def count_parameters(model: nn.Module) -> int:
    """Trainable scalars; a tied matrix counts once. Under ZeRO-3 the full size, not the local shard."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def _to_positions(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Rows of real tokens [..., N, D] at their places in [..., B, T, D], zeros at padding."""
    (sequences, length), (*leading, _, dim) = batch.tokens_BT.shape, rows.shape
    placed = rows.new_zeros(*leading, sequences * length, dim).index_copy(-2, batch.valid_N, rows)
    return placed.unflatten(-2, (sequences, length))


def _per_sequence(sample: LatentSample, batch: Batch) -> LatentSample:
    """A sample of tokens as one of sequences: z at its positions, nats summed over a sequence's tokens."""

    def total(nats_N: torch.Tensor) -> torch.Tensor:
        return segment_sum(nats_N, batch.offsets_B1)

    return LatentSample(
        z=_to_positions(sample.z, batch),
        kl=total(sample.kl),
        kl_free=total(sample.kl_free),
        kl_per_dim=sample.kl_per_dim,
        log_q=torch.stack([total(row) for row in sample.log_q]),
        log_p=torch.stack([total(row) for row in sample.log_p]),
    )


def _build_encoder(
    config: ModelConfig, recompute: bool
) -> LstmEncoder | TransformerEncoder | BagOfWordsEncoder | HuggingFaceEncoder:
    part = config.encoder
    if isinstance(part, LstmConfig):
        return LstmEncoder(part, config)
    if isinstance(part, TransformerConfig):
        return TransformerEncoder(part, config, recompute)
    if isinstance(part, HuggingFaceConfig):
        return HuggingFaceEncoder(part, config, recompute)
    return BagOfWordsEncoder(config)


def _build_decoder(
    config: ModelConfig, recompute: bool
) -> LstmDecoder | TransformerDecoder | BagOfWordsDecoder | HuggingFaceDecoder:
    part = config.decoder
    if isinstance(part, LstmConfig):
        return LstmDecoder(part, config)
    if isinstance(part, TransformerConfig):
        return TransformerDecoder(part, config, recompute)
    if isinstance(part, HuggingFaceConfig):
        return HuggingFaceDecoder(part, config, recompute)
    return BagOfWordsDecoder(config)
