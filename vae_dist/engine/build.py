"""The model and its loss from a configuration, and DeepSpeed's engine around them."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from vae_dist.config.schema import Config
from vae_dist.data.text.tokenizer import Tokenizer
from vae_dist.engine.compiler import one_compiles, require_compiler
from vae_dist.engine.zero import build_engine
from vae_dist.errors import MachineError
from vae_dist.model.embedding_vectors import initialise
from vae_dist.model.huggingface_checkpoint import start_from_checkpoints
from vae_dist.model.precision import autocast_dtype
from vae_dist.model.vae import TextVAE
from vae_dist.objective.elbo import NegativeElbo
from vae_kernels import resolve_backend


def start_engine(
    config: Config, tokenizer: Tokenizer, device: torch.device
) -> tuple[deepspeed.DeepSpeedEngine, list[str]]:
    """The model under DeepSpeed, at its start, and what there is to say about that. Collective."""
    try:
        resolve_backend(config.train.kernels, torch.empty(0, device=device))
    except RuntimeError as error:
        raise MachineError(f"train.kernels = {config.train.kernels}: {error}") from None
    require_compiler()
    with one_compiles():
        deepspeed.init_distributed()
    objective, notes = build_objective(config, tokenizer, device)
    engine = build_engine(
        objective, config.optimizer, config.cluster, config.train.batch_sequences, dist.get_world_size()
    )
    return engine, notes


def build_objective(
    config: Config, tokenizer: Tokenizer, device: torch.device, seed_offset: int = 0
) -> tuple[NegativeElbo, list[str]]:
    """Model and loss, freshly initialised from the run's seed, and what there is to say about that."""
    torch.manual_seed(config.train.seed + seed_offset)
    vae = TextVAE(
        config.model,
        tokenizer.vocab_size,
        kernels=config.train.kernels,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    notes = start_from_checkpoints(vae, tokenizer)
    if config.model.embedding_vectors:
        vectors = Path(config.model.embedding_vectors)
        notes.append(f"{vectors.name}: {initialise(vae.embedding.weight, vectors, tokenizer)}")
    return NegativeElbo(vae, config.objective, autocast_dtype(config.train.precision, device)).to(device), notes
