"""Encoders and decoders that are models of Hugging Face `transformers`, an optional package imported when one is built.

Shapes: B sequences, T positions, E embedding, W width, D latent.

A part is made of its `architecture`, what a config.json holds, so that an exported model needs no other directory;
what it starts from is in `huggingface_checkpoint.py`. The tokens' embeddings and the softmax are ours: the model reads
`inputs_embeds`, and its own embedding matrix, pooler and head are left out. Initialised from BERT and GPT-2 this is the
arrangement of Optimus (Li et al. 2020, section 3), but for its memory in every layer: here z is one prefix position,
which every layer of any architecture attends to.
"""

from __future__ import annotations

import importlib
import inspect
import socket
from typing import Any, Literal

import torch
from torch import nn

from vae_dist.config.model_schema import HuggingFaceConfig, ModelConfig
from vae_dist.errors import ConfigError, MachineError, ModelError

Where = Literal["encoder", "decoder"]


def transformers_package() -> Any:
    """`transformers`.

    Raises:
        MachineError: it is not installed, or does not work.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MachineError(
            f"An encoder or decoder of kind huggingface needs the package transformers on {socket.gethostname()}: "
            f"{error}. Run: pip install 'vae_dist[huggingface]'."
        ) from None


def huggingface_config(part: HuggingFaceConfig, where: Where, dropout: float) -> Any:
    """The package's own configuration object of a part, with our dropout in its layers.

    Raises:
        ConfigError: the package knows no such model, or refuses its settings.
    """
    package, architecture = transformers_package(), dict(part.architecture or {})
    model_type = architecture.get("model_type")
    if model_type not in package.CONFIG_MAPPING:
        raise ConfigError(
            f"model.{where}: transformers {package.__version__} has no model of model_type = {model_type!r}, and code "
            "that comes with a checkpoint is not run. Use one such as bert, gpt2, llama or qwen3."
        )
    try:
        config = package.CONFIG_MAPPING[model_type].from_dict(architecture)
    except Exception as error:  # every model checks its settings in its own way
        raise _refused(where, model_type, error) from None
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            # Embeddings have had their dropout already; whole layers are never left out.
            setattr(config, name, 0.0 if name.startswith("emb") or "layerdrop" in name else dropout)
    # Models of BERT's kind are causal when they are told to be.
    if hasattr(config, "is_decoder"):
        config.is_decoder = where == "decoder"
    config.use_cache = False
    return config


def strip(model: nn.Module) -> None:
    """Leave out what gets no gradient: the embeddings of the model's own tokens, and what is made of its first one."""
    model.set_input_embeddings(None)  # type: ignore[operator]
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]


class _Backbone(nn.Module):
    """A model of `transformers` with weights as that package starts them."""

    def __init__(self, part: HuggingFaceConfig, model: ModelConfig, where: Where, recompute: bool) -> None:
        super().__init__()
        self.where, config = where, huggingface_config(part, where, model.dropout)
        _require_kind(config, where)
        try:
            self.model: Any = transformers_package().AutoModel.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _refused(where, config.model_type, error) from None
        _require_arguments(self.model, where)
        embedding_dim = self.model.get_input_embeddings().embedding_dim
        if embedding_dim != model.embedding_dim:
            raise ConfigError(
                f"model.embedding_dim = {model.embedding_dim}, but the embeddings of model.{where} "
                f"({config.model_type}) have {embedding_dim} dimensions. Set model.embedding_dim={embedding_dim}; "
                "encoder and decoder share the embeddings, so that two such parts must agree."
            )
        if recompute:
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        strip(self.model)
        self.output_dim = int(config.hidden_size)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)

    def require_positions(self, tokens: int) -> None:
        """Refuse sequences that are longer than the model has positions for.

        Raises:
            ConfigError: they are.
        """
        if self.max_positions is not None and tokens > self.max_positions:
            raise ConfigError(
                f"Sequences of {tokens} positions (a prefix for the latent included) are too long for "
                f"model.{self.where}, which has {self.max_positions}. Prepare the data with a smaller max_tokens, or "
                "ask for fewer tokens."
            )


class HuggingFaceEncoder(_Backbone):
    """Embeddings to the mean of the last layer over real positions, or to the last layer at every position.

    A model of BERT's kind sees both sides of a token, one of GPT's kind those before it.
    """

    def __init__(self, part: HuggingFaceConfig, model: ModelConfig, recompute: bool) -> None:
        super().__init__(part, model, "encoder", recompute)
        self.per_token = model.latent == "token"

    def forward(self, x_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """One vector a sequence, [B, W], or a token, [B, T, W] (at padding: any finite number)."""
        self.require_positions(x_BTE.shape[1])
        real_BT = torch.arange(x_BTE.shape[1], device=x_BTE.device) < lengths_B[:, None]
        y_BTW: torch.Tensor = self.model(inputs_embeds=x_BTE, attention_mask=real_BT.long()).last_hidden_state
        if self.per_token:
            return y_BTW
        return (y_BTW * real_BT[..., None]).sum(1) / lengths_B[:, None].to(y_BTW.dtype)


class HuggingFaceDecoder(_Backbone):
    """Causal model conditioned on z; without a latent a language model.

    `embedding`: a projection of z is added to every input embedding.
    `memory`: z is projected to one prefix position, an input embedding that every token attends to.
    """

    def __init__(self, part: HuggingFaceConfig, model: ModelConfig, recompute: bool) -> None:
        super().__init__(part, model, "decoder", recompute)
        injection = model.injection if model.latent != "none" else None
        in_input, in_prefix = injection in ("embedding", "both"), injection in ("memory", "both")
        self.to_input = nn.Linear(model.latent_dim, model.embedding_dim, bias=False) if in_input else None
        self.to_prefix = nn.Linear(model.latent_dim, model.embedding_dim) if in_prefix else None
        self.first_position = -1 if in_prefix else 0
        self.embedding_dim = model.embedding_dim

    def forward(self, x_BTE: torch.Tensor, z: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, W] for z [B, D] or, injected into the embeddings alone, [B, T, D].

        Causal, so padding at the end needs no mask.
        """
        x_BTE = self._with_latent(x_BTE, z)
        if self.to_prefix is not None:
            x_BTE = torch.cat([self.to_prefix(z)[:, None].to(x_BTE.dtype), x_BTE], dim=1)
        self.require_positions(x_BTE.shape[1])
        y_BTW: torch.Tensor = self.model(inputs_embeds=x_BTE, use_cache=False).last_hidden_state
        return y_BTW if self.to_prefix is None else y_BTW[:, 1:]

    @torch.no_grad()
    def new_state(self, rows: int, max_tokens: int) -> list[torch.Tensor]:
        """Keys and values of every layer in turn, [rows, heads, S, head size]: S places, one for the prefix.

        Raises:
            ModelError: a layer remembers something else, such as a recurrent state.
        """
        places = max_tokens + self._before
        self.require_positions(places)
        weight = next(self.model.parameters())
        cache = transformers_package().DynamicCache(config=self.model.config)
        self.model(inputs_embeds=weight.new_zeros(1, 1, self.embedding_dim), cache=cache, use_cache=True)
        state = []
        for layer in cache.layers:
            window = getattr(layer, "sliding_window", places)
            if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer") or window < places:
                raise ModelError(
                    f"model.decoder ({self.model.config.model_type}) has a layer that remembers in its own way "
                    f"({type(layer).__name__}), so that sequences at different positions cannot be decoded together. "
                    "Use a decoder with plain attention, such as gpt2, llama or qwen3, or ask for fewer tokens than "
                    "its window."
                )
            for one in (layer.keys, layer.values):
                state.append(one.new_zeros(rows, one.shape[1], places, one.shape[3]))
        return state

    def step(
        self, x_BE: torch.Tensor, z_BD: torch.Tensor, state: list[torch.Tensor], position_B: torch.Tensor, span: int
    ) -> torch.Tensor:
        """One token, or the prefix, of every row: hidden [B, W]."""
        x_B1E, place_B, span = self._with_latent(x_BE[:, None], z_BD), position_B + self._before, span + self._before
        if self.to_prefix is not None:
            x_B1E = torch.where(position_B[:, None, None] < 0, self.to_prefix(z_BD)[:, None].to(x_B1E.dtype), x_B1E)
        unseen_BS = torch.arange(span, device=place_B.device) > place_B[:, None]
        # Added to the scores, which every kind of attention of the package does with a mask of four dimensions.
        mask_B11S = x_B1E.new_zeros(unseen_BS.shape).masked_fill(unseen_BS, torch.finfo(x_B1E.dtype).min)[:, None, None]
        hidden_B1W: torch.Tensor = self.model(
            inputs_embeds=x_B1E,
            attention_mask=mask_B11S,
            position_ids=place_B[:, None],
            cache=_Places(state, place_B, span),
            use_cache=True,
        ).last_hidden_state
        return hidden_B1W[:, 0]

    @property
    def _before(self) -> int:
        """Places before the first token's."""
        return int(self.to_prefix is not None)

    def _with_latent(self, x_BTE: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if self.to_input is None:
            return x_BTE
        return x_BTE + (self.to_input(z) if z.dim() == 3 else self.to_input(z)[:, None])


class _Places:
    """What the package's models ask of a cache, where every row writes at its own place."""

    def __init__(self, state: list[torch.Tensor], place_B: torch.Tensor, span: int) -> None:
        self._state, self._place_B, self._span = state, place_B, span
        self._row_B = torch.arange(len(place_B), device=place_B.device)

    def update(
        self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a token's key and value, [B, heads, 1, head size] each; returns what there is below the span."""
        keys, values = self._state[2 * layer_idx : 2 * layer_idx + 2]
        keys[self._row_B, :, self._place_B], values[self._row_B, :, self._place_B] = k[:, :, 0], v[:, :, 0]
        return keys[:, :, : self._span], values[:, :, : self._span]

    def get_seq_length(self) -> int:
        """Of no use: positions and mask are given."""
        return 0


def _require_kind(config: Any, where: Where) -> None:
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise ConfigError(
            f"model.{where}: {config.model_type} is not one stack of layers over text. Use an encoder such as bert, or "
            "a decoder such as gpt2, llama or qwen3."
        )
    if where == "decoder":
        # Read where it is defined: the package's front door has no name for it.
        names = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if config.model_type not in names:
            raise ConfigError(
                f"model.decoder: {config.model_type} is no language model, which reads from left to right. Use one "
                "such as gpt2, llama or qwen3."
            )


def _require_arguments(model: nn.Module, where: Where) -> None:
    of_decoder = ("position_ids", "cache", "use_cache") if where == "decoder" else ()
    needed = ("inputs_embeds", "attention_mask", *of_decoder)
    there = inspect.signature(model.forward).parameters
    lacking = [name for name in needed if name not in there]
    if lacking:
        raise ConfigError(
            f"model.{where}: {type(model).__name__} of transformers takes no {' and no '.join(lacking)}, which an "
            f"{where} here needs. Use one such as bert (encoder), gpt2, llama or qwen3."
        )


def _refused(where: Where, model_type: str | None, error: Exception) -> ConfigError:
    problem = " ".join(str(error).split()).rstrip(".")
    return ConfigError(f"model.{where}.architecture makes no {model_type}: {problem}. Mend it, or give a checkpoint.")
