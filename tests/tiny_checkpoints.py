"""Checkpoints of `transformers`, tiny, with random weights, and models of ours that start from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from vae_dist.config.model_schema import HuggingFaceConfig, LstmConfig, ModelConfig
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import Batch, collate
from vae_dist.data.text.special_ids import EOS_ID
from vae_dist.data.text.tokenizer import Tokenizer, build_tokenizer
from vae_dist.model.huggingface_checkpoint import start_from_checkpoints, with_architectures
from vae_dist.model.vae import TextVAE

if os.environ.get("CI") == "true":
    import transformers
else:
    transformers = pytest.importorskip("transformers")

WIDTH, POSITIONS, THEIR_VOCAB = 16, 24, 40
# Ids of the checkpoints' tokens are not ours, and one word of each vocabulary is unknown to the other.
OUR_WORDS = ("the", "old", "sailor", "watched", "a", "boat", "harbour")
THEIR_TOKENS = ("[end]", "a", "zebra", "the", "boat", "<unk>", "sailor", "old", "watched")
KINDS = ("bert", "gpt2", "llama", "qwen2", "qwen3")


def huggingface_model(kind: str, **changes: Any) -> Any:
    """A language model; Llama has a head of its own, the others' are tied."""
    grouped = {
        "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "vocab_size": THEIR_VOCAB,
        "bos_token_id": 0, "eos_token_id": 0, "attention_dropout": 0.1,
    }  # fmt: skip
    bert = {name: value for name, value in grouped.items() if name not in ("num_key_value_heads", "attention_dropout")}
    gpt2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "vocab_size": THEIR_VOCAB}
    values = {
        "bert": bert | {"pad_token_id": None},
        "gpt2": gpt2 | {"bos_token_id": 0, "eos_token_id": 0},
        "llama": grouped | {"tie_word_embeddings": False},
        "qwen2": grouped | {"tie_word_embeddings": True},
        "qwen3": grouped | {"tie_word_embeddings": True, "head_dim": 8},
    }[kind] | changes
    classes = {
        "bert": transformers.BertForMaskedLM,
        "gpt2": transformers.GPT2LMHeadModel,
        "llama": transformers.LlamaForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
        "qwen3": transformers.Qwen3ForCausalLM,
    }
    torch.manual_seed(7)
    model = classes[kind](transformers.CONFIG_MAPPING[kind](**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The package's start is so small that layers hardly show, and its biases are zero.
            parameter.normal_(1.0 if "norm" in name.lower() or "ln_" in name else 0.0, 0.25)
    return model.eval()


def their_tokenizer(tokens: tuple[str, ...] = THEIR_TOKENS) -> tokenizers.Tokenizer:
    ids = {token: number for number, token in enumerate(tokens)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=tokens[0]))


def write_checkpoints(factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each kind."""
    folders = {kind: factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        huggingface_model(kind).save_pretrained(folder)
        their_tokenizer().save(str(folder / "tokenizer.json"))
    return folders


def our_tokenizer() -> Tokenizer:
    texts = [" ".join([word] * (len(OUR_WORDS) - i)) for i, word in enumerate(OUR_WORDS)]
    return build_tokenizer(texts, PrepareConfig(tokenizer="word", pre_tokenizer="whitespace", min_frequency=1))


TOKENIZER = our_tokenizer()
VOCAB = TOKENIZER.vocab_size


def part(checkpoint: Path) -> HuggingFaceConfig:
    return HuggingFaceConfig(checkpoint=str(checkpoint))


def make_config(**changes: Any) -> ModelConfig:
    lstm = LstmConfig(hidden_dim=12)
    values = {"embedding_dim": WIDTH, "latent_dim": 5, "encoder": lstm, "decoder": lstm, "dropout": 0.0}
    return with_architectures(ModelConfig(**(values | changes)))


def make_vae(recompute: bool = False, **changes: Any) -> TextVAE:
    torch.manual_seed(0)
    vae = TextVAE(make_config(**changes), VOCAB, activation_checkpointing=recompute)
    start_from_checkpoints(vae, TOKENIZER)
    return vae.eval()


def make_batch(lengths: list[int], seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    rows = [np.append(rng.integers(4, VOCAB, n - 1), EOS_ID) for n in lengths]
    return collate(Sequences.from_list(rows), np.arange(len(rows)))


def both_ids(count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random words by our ids and by theirs, of words that both have."""
    ours = {token: row for token, row in TOKENIZER._inner.get_vocab().items() if token in OUR_WORDS}
    shared = [word for word in OUR_WORDS if word in THEIR_TOKENS]
    chosen = np.random.default_rng(1).integers(0, len(shared), (count, length))
    rows = torch.tensor([[ours[shared[i]] for i in row] for row in chosen])
    return rows, torch.tensor([[THEIR_TOKENS.index(shared[i]) for i in row] for row in chosen])
