"""Encoder, decoder and embeddings that start from Hugging Face checkpoints on disk: config.json and *.safetensors.

Shapes: V vocabulary, E embedding.

Nothing is downloaded, unpickled or run: directories alone, safetensors alone, the package's own models alone. The
architecture is read on the driver and becomes part of the run's configuration; the weights are read by every worker.

Our tokens are not the checkpoint's, so embeddings are taken over by the token's text, as the two tokenizer.json spell
it: the pieces of one byte-level vocabulary are those of another, space marks included, and words are words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from safetensors import SafetensorError
from torch import nn

from vae_dist.config.model_schema import HuggingFaceConfig, ModelConfig
from vae_dist.data.text.special_ids import BOS_ID, EOS_ID
from vae_dist.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from vae_dist.errors import ConfigError, DataError
from vae_dist.model.embedding_vectors import match_scale
from vae_dist.model.huggingface import (
    HuggingFaceDecoder,
    HuggingFaceEncoder,
    Where,
    huggingface_config,
    strip,
    transformers_package,
)
from vae_dist.model.vae import TextVAE

# Places, versions and number formats: not what the model is.
_NOT_ARCHITECTURE = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


class _Checkpoint(NamedTuple):
    """What a directory holds.

    Attributes:
        part: the configuration that names it.
        weights: of the layers, by name, as in a stripped model.
        input_VE: float32, what the layers get for each of its tokens.
        output_VE: float32, the rows of its softmax; None where it has none.
    """

    folder: Path
    where: Where
    part: HuggingFaceConfig
    weights: dict[str, torch.Tensor]
    input_VE: torch.Tensor
    output_VE: torch.Tensor | None


def with_architectures(model: ModelConfig) -> ModelConfig:
    """The configuration with the architectures of its checkpoints, and their paths absolute. For the driver.

    Raises:
        ConfigError: there is no such checkpoint or no such architecture, or its embeddings are of another size.
        MachineError: `transformers` is not installed.
    """
    parts: dict[str, HuggingFaceConfig] = {}
    if isinstance(model.encoder, HuggingFaceConfig) and model.latent != "none":
        parts["encoder"] = _with_architecture(model.encoder, "encoder")
    if isinstance(model.decoder, HuggingFaceConfig):
        parts["decoder"] = _with_architecture(model.decoder, "decoder")
    filled = model.model_copy(update=parts)
    # What cannot be built is refused before anything is launched.
    _skeletons(filled)
    return filled


def require_positions(model: ModelConfig, max_tokens: int) -> None:
    """Refuse data with longer sequences than the parts have positions for. For the driver.

    Raises:
        ConfigError: there are.
    """
    encoder, decoder = _skeletons(model)
    if encoder is not None:
        encoder.require_positions(max_tokens)
    if decoder is not None:
        decoder.require_positions(max_tokens + (decoder.to_prefix is not None))


def without_checkpoints(model: ModelConfig) -> ModelConfig:
    """The configuration of a model that has its weights: it needs no directory of one machine any more."""
    parts = {name: getattr(model, name) for name in ("encoder", "decoder")}
    forgotten = {
        name: part.model_copy(update={"checkpoint": None})
        for name, part in parts.items()
        if isinstance(part, HuggingFaceConfig)
    }
    return model.model_copy(update=forgotten)


@torch.no_grad()
def start_from_checkpoints(vae: TextVAE, tokenizer: Tokenizer) -> list[str]:
    """Write the weights of the configured checkpoints into a model, in place; what there is to say about each.

    Embeddings are those of the decoder's checkpoint, or of the encoder's where the decoder has none. The other rows
    keep their direction and are scaled to the root mean square of those. With a decoder's embeddings comes its softmax:
    `to_embedding` starts as the identity where it is square, and the rows of an untied output as those of its head.

    Raises:
        ConfigError: a checkpoint is not there.
        DataError: it is damaged, lacks weights, or has no token of the vocabulary.
    """
    notes, last = [], None
    for where, module in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        if not isinstance(module, HuggingFaceEncoder | HuggingFaceDecoder):
            continue
        part: HuggingFaceConfig = getattr(vae.config, where)
        if part.checkpoint is not None:
            last = _read(part, module.where)
            module.model.load_state_dict(last.weights)
            notes.append(f"{where}: weights of {last.folder}")
    return [*notes, _start_embeddings(vae, last, tokenizer)] if last is not None else notes


def _skeletons(model: ModelConfig) -> tuple[HuggingFaceEncoder | None, HuggingFaceDecoder | None]:
    """The parts without memory for their weights."""
    encoder, decoder = None, None
    with torch.device("meta"):
        if isinstance(model.encoder, HuggingFaceConfig) and model.latent != "none":
            encoder = HuggingFaceEncoder(model.encoder, model, recompute=False)
        if isinstance(model.decoder, HuggingFaceConfig):
            decoder = HuggingFaceDecoder(model.decoder, model, recompute=False)
    return encoder, decoder


def _with_architecture(part: HuggingFaceConfig, where: Where) -> HuggingFaceConfig:
    if part.checkpoint is None:
        _require_known_keys(part, where)
        return part
    folder = _require_checkpoint(part.checkpoint, where)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.{where}.checkpoint: {folder}/config.json is no JSON: {error}.") from None
    if not isinstance(facts, dict):
        raise ConfigError(f"model.{where}.checkpoint: {folder}/config.json holds no settings of a model.")
    if "quantization_config" in facts:
        raise ConfigError(f"model.{where}.checkpoint: {folder} is quantised. Give the checkpoint it was made from.")
    architecture = {name: value for name, value in facts.items() if name not in _NOT_ARCHITECTURE}
    given = part.architecture
    if given is not None and given != architecture:
        names = sorted(n for n in given.keys() | architecture.keys() if given.get(n) != architecture.get(n))
        raise ConfigError(
            f"model.{where}.architecture and {folder}/config.json differ in {', '.join(names)}. Leave architecture "
            "out, or the checkpoint."
        )
    return part.model_copy(update={"checkpoint": str(folder), "architecture": architecture})


def _require_known_keys(part: HuggingFaceConfig, where: Where) -> None:
    """The package passes over settings that it does not know; a mistyped one would go unnoticed."""
    config = huggingface_config(part, where, dropout=0.0)
    known = {*type(config)().to_dict(), *getattr(config, "attribute_map", {})}
    unknown = sorted((part.architecture or {}).keys() - known)
    if unknown:
        raise ConfigError(
            f"model.{where}.architecture: {config.model_type} has no {', '.join(unknown)}. It has "
            f"{', '.join(sorted(name for name in known if not name.startswith('_')))}."
        )


def _require_checkpoint(checkpoint: str, where: Where) -> Path:
    folder = Path(checkpoint).expanduser().resolve()
    key, wanted = f"model.{where}.checkpoint", "config.json and *.safetensors, as save_pretrained writes them"
    if not folder.is_dir():
        raise ConfigError(f"{key}: there is no directory {folder}. Give one with {wanted}; nothing is downloaded.")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}: {folder} has no config.json. Give a directory with {wanted}.")
    if any(folder.glob("*.safetensors")):
        return folder
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_WEIGHTS)
    if others:
        raise ConfigError(
            f"{key}: {folder} has its weights in {others[0]} and none in *.safetensors. Files of other formats, "
            "pickles among them, are not read. Load it where you trust it, and save it again with save_pretrained."
        )
    raise ConfigError(f"{key}: {folder} has no weights. Give a directory with {wanted}.")


def _read(part: HuggingFaceConfig, where: Where) -> _Checkpoint:
    folder, package = _require_checkpoint(part.checkpoint or "", where), transformers_package()
    auto = package.AutoModelForCausalLM if where == "decoder" else package.AutoModel
    # What is lacking we say ourselves, and workers have no terminal for a bar.
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    try:
        model, report = auto.from_pretrained(
            folder,
            config=huggingface_config(part, where, dropout=0.0),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder} cannot be read: {' '.join(str(error).split())}. Save it again.") from None
    base, missing = model.base_model, set(report["missing_keys"])
    # A checkpoint without a head, or an encoder's without what is made of the first token, is a whole one.
    prefix = "" if base is model else f"{model.base_model_prefix}."
    spare = {name for name in missing if not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")}
    if missing > spare:
        lacking = sorted(missing - spare)
        raise DataError(f"{folder} lacks {len(lacking)} weights, {lacking[0]} among them. Save it again.")
    embedding = base.get_input_embeddings()
    # Some models scale the rows of their matrix.
    input_VE = embedding(torch.arange(embedding.num_embeddings))
    head = None if base is model or spare else model.get_output_embeddings()
    strip(base)
    return _Checkpoint(folder, where, part, base.state_dict(), input_VE, None if head is None else head.weight)


def _start_embeddings(vae: TextVAE, checkpoint: _Checkpoint, tokenizer: Tokenizer) -> str:
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        return f"{checkpoint.folder} has no tokenizer.json: the embeddings start at random"
    ours, theirs = _shared_rows(tokenizer, path, checkpoint)
    words, found = tokenizer.vocab_size - len(SPECIAL_TOKENS), sum(row >= len(SPECIAL_TOKENS) for row in ours)
    if not found:
        raise DataError(
            f"{path} has no token of the data set's tokenizer. Prepare the data with a tokenizer of the same kind "
            "(data.prepare.tokenizer), or take that file out of the checkpoint to start from random embeddings."
        )
    _overwrite(vae.embedding.weight, ours, checkpoint.input_VE[theirs])
    if checkpoint.where == "decoder":
        if vae.output_weight is not None:
            output_VE = checkpoint.input_VE if checkpoint.output_VE is None else checkpoint.output_VE
            _overwrite(vae.output_weight, ours, output_VE[theirs])
        if vae.to_embedding.in_features == vae.to_embedding.out_features:
            nn.init.eye_(vae.to_embedding.weight)
    return f"{path}: embeddings of {found:,} of {words:,} tokens ({found / words:.1%})"


def _overwrite(weight_VE: torch.Tensor, rows: list[int], values: torch.Tensor) -> None:
    is_known_V = torch.zeros(len(weight_VE), dtype=torch.bool)
    is_known_V[rows] = True
    weight_VE[rows] = values.to(weight_VE)
    match_scale(weight_VE, is_known_V.to(weight_VE.device))


def _shared_rows(tokenizer: Tokenizer, path: Path, checkpoint: _Checkpoint) -> tuple[list[int], list[int]]:
    """Ids of the tokens that both vocabularies have, ours and the checkpoint's; of <s> and </s> by what they do."""
    try:
        there = tokenizers.Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(f"{path} is not a Hugging Face tokenizer file: {error}. Save it again.") from None
    pairs = {row: there[token] for token, row in tokenizer.vocabulary().items() if token in there}
    for row, name in ((BOS_ID, "bos_token_id"), (EOS_ID, "eos_token_id")):
        role = (checkpoint.part.architecture or {}).get(name)
        role = role[0] if isinstance(role, list) and role else role
        if isinstance(role, int):
            pairs[row] = role
    known = sorted((row, other) for row, other in pairs.items() if other < len(checkpoint.input_VE))
    return [row for row, _ in known], [other for _, other in known]
