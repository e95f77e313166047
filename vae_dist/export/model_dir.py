"""The model directory: all that eval, sample and serve read. Weights in safetensors, the rest in JSON.

model.safetensors   float32 weights by name
config.json         format version, model configuration, vocabulary size, maximum length, provenance
tokenizer.json      Hugging Face `tokenizers` file
card.md             what the model is, for people
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vae_dist.config.model_schema import ModelConfig
from vae_dist.data.text.tokenizer import Tokenizer
from vae_dist.errors import DataError, ModelError
from vae_dist.model.vae import TextVAE

FORMAT_VERSION = 1
_KEYS = ("model", "vocab_size", "max_tokens", "tokenizer_sha256", "weights_sha256", "provenance")
FILES = ("model.safetensors", "config.json", "tokenizer.json", "card.md")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use: eval mode, float32.

    Attributes:
        info: config.json as read.
        max_tokens: longest sequence the model was trained on, end of sequence included.
        weights_sha256: names the exact weights.
    """

    path: Path
    vae: TextVAE
    tokenizer: Tokenizer
    info: dict[str, Any]
    weights_sha256: str

    @property
    def max_tokens(self) -> int:
        """Longest text in tokens, end of sequence counted."""
        return int(self.info["max_tokens"])


def write_model(
    path: Path,
    weights: dict[str, torch.Tensor],
    model: ModelConfig,
    tokenizer: Tokenizer,
    max_tokens: int,
    provenance: dict[str, Any],
) -> None:
    """Write a model directory; config.json is written last, so a directory without it is unfinished."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").unlink(missing_ok=True)
    save_file({name: w.contiguous() for name, w in weights.items()}, path / "model.safetensors")
    tokenizer.save(path / "tokenizer.json")
    info = {
        "format_version": FORMAT_VERSION,
        "model": model.model_dump(mode="json"),
        "vocab_size": tokenizer.vocab_size,
        "max_tokens": max_tokens,
        "tokenizer_sha256": tokenizer.sha256,
        "weights_sha256": _sha256(path / "model.safetensors"),
        "provenance": provenance,
    }
    (path / "card.md").write_text(_card(info), encoding="utf-8")
    temporary = path / "config.json.tmp"
    temporary.write_text(json.dumps(info, indent=1), encoding="utf-8")
    os.replace(temporary, path / "config.json")


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Read a model directory, or a run directory that contains one.

    Raises:
        ModelError: it is missing, unfinished, damaged, or of another format version.
    """
    path = find_model_dir(Path(path))
    info = _read_info(path / "config.json")
    try:
        tokenizer = Tokenizer.load(path / "tokenizer.json")
    except DataError:
        raise ModelError(f"{path}/tokenizer.json is missing or damaged. Export the model again.") from None
    if tokenizer.sha256 != info["tokenizer_sha256"]:
        raise ModelError(f"{path}/tokenizer.json is not the tokenizer this model was trained with. Export it again.")
    digest = _sha256(path / "model.safetensors")
    if digest != info["weights_sha256"]:
        raise ModelError(
            f"{path}/model.safetensors is damaged: its hash is not the one in config.json. Export it again."
        )
    try:
        vae = TextVAE(ModelConfig.model_validate(info["model"]), info["vocab_size"])
        vae.load_state_dict(load_file(path / "model.safetensors"))
    except (SafetensorError, RuntimeError, ValidationError, OSError) as error:
        raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0]} Export it again.") from None
    return LoadedModel(path, vae.to(device).eval(), tokenizer, info, digest)


def find_model_dir(path: Path) -> Path:
    """`path` itself, or its `model/` when it is a run directory."""
    candidates = [path, path / "model"]
    for candidate in candidates:
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    if not path.exists():
        raise ModelError(f"There is no model directory {path}. Train one with `python -m vae_dist.train`.")
    raise ModelError(
        f"{path} is no model directory: it needs {', '.join(FILES[:3])}. A run has one in RUN/model when it has "
        "finished; `vae-dist export RUN OUT` makes one of its newest checkpoint."
    )


def copy_model(source: Path, target: Path) -> None:
    """Copy a model directory's files, config.json last."""
    target.mkdir(parents=True, exist_ok=True)
    for name in sorted(FILES, key=lambda n: n == "config.json"):
        shutil.copyfile(source / name, target / name)


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = info["format_version"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{path} is not readable as a model description. Export the model again.") from None
    if version != FORMAT_VERSION:
        raise ModelError(f"{path} has format version {version}; this vae_dist reads {FORMAT_VERSION}. Upgrade it.")
    lacking = [key for key in _KEYS if key not in info]
    if lacking:
        raise ModelError(f"{path} lacks {', '.join(lacking)}. Export the model again.")
    return info


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _card(info: dict[str, Any]) -> str:
    facts = "\n".join(f"- {key}: {value}" for key, value in info["provenance"].items())
    model = info["model"]
    latent = {"none": "", "token": " for each token"}.get(model["latent"], " for each sequence")
    kind, uses = "A language model", "`vae-dist sample DIR`"
    if latent:
        kind = f"A variational autoencoder over text with {model['latent_dim']} latent dimensions{latent}"
        uses += ", `vae-dist reconstruct DIR`, `vae-dist interpolate DIR`"
    return (
        f"# {'Text VAE' if latent else 'Language model'}\n\n"
        f"{kind}, with a vocabulary of {info['vocab_size']} tokens, for sequences of at most {info['max_tokens']} "
        "tokens. Trained with vae_dist.\n\n"
        f"{facts}\n\n"
        f"Use: {uses}, `vae-dist serve DIR`.\n"
        "The text it writes resembles its training data and makes no claim to be true.\n"
    )
