"""The `model` section: embedding, encoder, posterior, prior, decoder. A new part is a new `kind`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from vae_dist.config.section import Name, NonNegative, Positive, PositiveFloat, Section, Share, by_kind


class LstmConfig(Section):
    """A recurrent encoder or decoder."""

    kind: Literal["lstm"] = "lstm"
    hidden_dim: Positive = 256
    """Hidden state size (per direction in an encoder)."""
    num_layers: Positive = 1
    """Stacked layers."""
    recurrent_dropout: Share = 0.0
    """Probability that a recurrent weight is dropped for a whole batch (DropConnect, Merity et al. 2018)."""


class TransformerConfig(Section):
    """A Transformer encoder or decoder: RMSNorm, rotary positions, SwiGLU."""

    kind: Literal["transformer"] = "transformer"
    hidden_dim: Positive = 256
    """Model width."""
    num_layers: Positive = 4
    """Blocks."""
    num_heads: Positive = 4
    """Attention heads; must divide hidden_dim into even head sizes (rotary positions)."""
    mlp_ratio: PositiveFloat = 8 / 3
    """Width of the SwiGLU layer over hidden_dim, rounded up to a multiple of 32."""


class BagOfWordsConfig(Section):
    """Linear: an encoder that averages the embeddings, a decoder that draws every word from softmax(W z + b)."""

    kind: Literal["bag_of_words"] = "bag_of_words"


class HuggingFaceConfig(Section):
    """A model of Hugging Face `transformers` (an extra): an encoder such as BERT, a decoder such as GPT-2 or Llama."""

    kind: Literal["huggingface"] = "huggingface"
    checkpoint: Name | None = None
    """A directory with config.json and *.safetensors that the weights start from; with a tokenizer.json the embeddings
    of tokens that our vocabulary shares do, too (the decoder's before the encoder's). null: random weights."""
    architecture: dict[str, Any] | None = None
    """What config.json says, filled in from the checkpoint; without one {model_type: llama, hidden_size: 64, ...}.
    Its hidden size must be embedding_dim, and model.dropout takes the place of its dropout."""


Backbone = Annotated[
    Annotated[LstmConfig, Tag("lstm")]
    | Annotated[TransformerConfig, Tag("transformer")]
    | Annotated[BagOfWordsConfig, Tag("bag_of_words")]
    | Annotated[HuggingFaceConfig, Tag("huggingface")],
    by_kind("lstm", "transformer", "bag_of_words", "huggingface"),
]


class GaussianConfig(Section):
    """q(z | x) = N(mean, diag exp(logvar)), both linear in the encoder's output."""

    kind: Literal["gaussian"] = "gaussian"
    batch_norm_gamma: PositiveFloat | None = None
    """BatchNorm on the means with this fixed scale (Zhu et al. 2020), over the whole global batch: the mean KL is at
    least D gamma^2 / 2; null is off."""


class DeltaConfig(Section):
    """A Gaussian whose KL is at least a committed rate in every dimension (delta-VAE, Razavi et al. 2019)."""

    kind: Literal["delta"] = "delta"
    nats_per_dim: Annotated[float, Field(gt=0.0, le=10.0)] = 0.1
    """The committed rate."""


class VmfConfig(Section):
    """von Mises-Fisher on the unit sphere with fixed concentration (Xu and Durrett 2018); the KL is a constant."""

    kind: Literal["vmf"] = "vmf"
    kappa: PositiveFloat = 80.0
    """Concentration."""


Posterior = Annotated[
    Annotated[GaussianConfig, Tag("gaussian")]
    | Annotated[DeltaConfig, Tag("delta")]
    | Annotated[VmfConfig, Tag("vmf")],
    by_kind("gaussian", "delta", "vmf"),
]


class StandardPriorConfig(Section):
    """N(0, I); for a vMF posterior the uniform distribution on the sphere."""

    kind: Literal["standard"] = "standard"


class MixturePriorConfig(Section):
    """A mixture of diagonal Gaussians."""

    kind: Literal["mixture"] = "mixture"
    components: Positive = 10
    """Gaussians."""


class VampPriorConfig(Section):
    """The mean of the posteriors of learned pseudo-inputs, sequences of embeddings (Tomczak and Welling 2018)."""

    kind: Literal["vamp"] = "vamp"
    components: Positive = 20
    """Pseudo-inputs."""
    pseudo_tokens: Positive = 8
    """Length of a pseudo-input in tokens."""


class FlowPriorConfig(Section):
    """z = f(u), u ~ N(0, I), with f of affine coupling layers (RealNVP, Dinh et al. 2017)."""

    kind: Literal["flow"] = "flow"
    layers: Positive = 4
    """Coupling layers; neighbours change alternate halves of z."""
    hidden_dim: Positive = 64
    """Width of the layers' networks."""


Prior = Annotated[
    Annotated[StandardPriorConfig, Tag("standard")]
    | Annotated[MixturePriorConfig, Tag("mixture")]
    | Annotated[VampPriorConfig, Tag("vamp")]
    | Annotated[FlowPriorConfig, Tag("flow")],
    by_kind("standard", "mixture", "vamp", "flow"),
]


class ModelConfig(Section):
    """Encoder, latent, decoder."""

    embedding_dim: Positive = 128
    """Size of the token embeddings, shared by encoder and decoder."""
    embedding_vectors: Name | None = None
    """A GloVe text file (also .gz) whose vectors the embeddings start from; its dimension must be embedding_dim."""
    freeze_embeddings: bool = False
    """Keep the embeddings as they start."""
    encoder: Backbone = LstmConfig()
    """What reads the text, by its `kind`."""
    decoder: Backbone = LstmConfig()
    """What writes it."""
    bidirectional: bool = False
    """LSTM encoder: read the sequence in both directions."""
    teacher_forcing: bool = True
    """LSTM decoder: read the token before; false: z alone at every step, all words at once."""
    latent: Literal["sequence", "token", "none"] = "sequence"
    """One z a sequence, one z a token, or none: a plain language model with the same decoder and no encoder."""
    latent_dim: Positive = 32
    """D, dimensions of z."""
    posterior: Posterior = GaussianConfig()
    """q(z | x), by its `kind`."""
    prior: Prior = StandardPriorConfig()
    """p(z), by its `kind`."""
    sampling_components: NonNegative = 0
    """After training fit a mixture of so many Gaussians to the latents of the training split by EM, and sample from
    it in place of the prior (Ghosh et al. 2020); 0 is off."""
    injection: Literal["embedding", "memory", "both", "layers", "cross_attention"] = "both"
    """How z reaches the decoder: added to every input embedding; as memory (initial state of an LSTM, a prefix
    position of a Transformer); both; or, in a Transformer, as one more key and value in each layer (Optimus) or as the
    only slot of a cross-attention in each block (Texar)."""
    tie_embeddings: bool = True
    """The output projection is the embedding matrix."""
    dropout: Share = 0.0
    """Dropout on embeddings and on the decoder's output."""
    shared_dropout: bool = False
    """The same dropout mask at all positions of a sequence (variational dropout, Gal and Ghahramani 2016)."""
    word_dropout: Share = 0.0
    """Probability that a decoder input token is replaced by <unk>."""
