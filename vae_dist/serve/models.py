"""The models of a replica: each in its own thread, by name, and replaced when its directory has another export."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException

from vae_dist.decode.encode import Encoded, likelihood, score
from vae_dist.decode.engine import DecodeEngine
from vae_dist.decode.latent_ops import TextModel
from vae_dist.decode.request import Decoding, Generated
from vae_dist.errors import VaeDistError
from vae_dist.export.model_dir import LoadedModel, find_model_dir, load_model
from vae_dist.model.precision import autocast_dtype
from vae_dist.observe.console import say
from vae_dist.serve.latent_map import latent_map, validation_texts
from vae_dist.serve.model_thread import ModelThread
from vae_dist.serve.request_schemas import DecodingOptions
from vae_dist.serve.settings import ServiceConfig

_MARGIN_S = 1.0


@dataclass(frozen=True)
class ServedModel:
    """A model under its name, and the thread that computes with it.

    Attributes:
        created: when it was exported, seconds since 1970.
        map: the answer of /v1/map as JSON, written once: it is the same for everybody, and large.
    """

    name: str
    created: int
    loaded: LoadedModel
    text: TextModel
    thread: ModelThread
    map: bytes

    async def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text's tokens and posterior."""
        return await self.thread.each(self.text.encode, texts)

    async def score(self, pairs: Sequence[tuple[Encoded, Generated]]) -> list[dict[str, Any]]:
        """How well each text is understood."""
        return await self.thread.each(self._score, pairs)

    async def likelihood(self, text: Encoded, samples: int) -> dict[str, Any]:
        """A text's bounds; one at a time, so that those who wait for tokens get theirs in between."""
        (found,) = await self.thread.call(partial(likelihood, samples=samples), self.loaded.vae, [text])
        return found

    def decoding(self, options: DecodingOptions) -> Decoding:
        """What a request asks of the decoder, within what the model can do."""
        longest = self.loaded.max_tokens
        return Decoding(
            options.temperature,
            options.top_k,
            options.top_p,
            min(options.max_tokens or longest, longest),
            options.allow_unknown,
            options.repetition_penalty,
        )

    def _score(self, pairs: Sequence[tuple[Encoded, Generated]]) -> list[dict[str, Any]]:
        return score(self.loaded.vae, pairs)


class Models:
    """All models of a replica. Another export in a directory replaces the model; a damaged one leaves it as it is.

    What is under way keeps the model that it began with, which lives as long as a request may.
    """

    def __init__(self, config: ServiceConfig) -> None:
        """Loads all of them, and has them do what requests will ask, so that the first one does not wait.

        Raises:
            ModelError: one is missing or damaged.
            DataError: one of the texts' data sets is.
        """
        self._texts = validation_texts(config.texts)
        self._config, self._stopped = config, threading.Event()
        self._seen = {name: _stamp(path) for name, path in config.models.items()}
        self._by_name = {name: self._start(name, load_model(path, _device())) for name, path in config.models.items()}
        self.problems: dict[str, str] = {}
        self.reloads: dict[tuple[str, str], int] = {}
        self._watch = threading.Thread(target=self._look, name="reload", daemon=True)
        self._watch.start()

    def find(self, name: str | None) -> ServedModel:
        """The model of a name, or the first.

        Raises:
            HTTPException: 404, there is none of that name.
        """
        found = next(iter(self._by_name.values())) if name is None else self._by_name.get(name)
        if found is None:
            raise HTTPException(404, f"There is no model {name!a} here; there are: {', '.join(self._by_name)}.")
        return found

    def all(self) -> list[ServedModel]:
        """In the order of the configuration."""
        return list(self._by_name.values())

    def stop(self) -> None:
        """End the threads; what is under way fails."""
        self._stopped.set()
        self._watch.join()
        for model in self.all():
            model.thread.stop()

    def _start(self, name: str, loaded: LoadedModel) -> ServedModel:
        dtype = autocast_dtype("auto", loaded.vae.output_bias.device)
        config = self._config
        engine = DecodeEngine(
            loaded.vae,
            loaded.max_tokens,
            slots=config.slots,
            queue=config.queue,
            token_budget=config.token_budget,
            dtype=dtype,
        )
        text = TextModel(loaded.vae, loaded.tokenizer, loaded.max_tokens, dtype)
        _warm_up(text, engine)
        created = int((loaded.path / "config.json").stat().st_mtime)
        drawn = latent_map(text, self._texts).model_dump_json().encode()
        return ServedModel(name, created, loaded, text, ModelThread(engine), drawn)

    def _look(self) -> None:
        while not self._stopped.wait(self._config.reload_every_s):
            for name, path in self._config.models.items():
                stamp = _stamp(path)
                # Without config.json, which is written last, an export is under way.
                if stamp and stamp != self._seen[name]:
                    self._seen[name] = stamp
                    self._reload(name, path)

    def _reload(self, name: str, path: str) -> None:
        old = self._by_name[name]
        try:
            loaded = load_model(path, _device())
            if loaded.info != old.loaded.info:
                self._by_name[name] = self._start(name, loaded)
        except Exception as error:  # whatever it is, the old one answers
            say(f"{name}: {path} was not taken up: {error}")
            self.problems[name] = str(error)
            self._count(name, "refused")
            return
        self.problems.pop(name, None)
        if self._by_name[name] is not old:
            say(f"{name}: {path} was taken up, weights {loaded.weights_sha256[:12]}")
            self._count(name, "taken up")
            retire = threading.Timer(self._config.request_timeout_s + _MARGIN_S, old.thread.stop)
            retire.daemon = True
            retire.start()

    def _count(self, name: str, outcome: str) -> None:
        self.reloads[name, outcome] = self.reloads.get((name, outcome), 0) + 1


def _warm_up(text: TextModel, engine: DecodeEngine) -> None:
    """Do once what requests will do: the first time costs seconds on a busy machine."""
    requests, _ = text.sample_requests(1, 0, Decoding(max_tokens=min(2, text.max_tokens)))
    rows = engine.run(requests)
    if text.vae.encoder is not None:
        encoded = text.encode(["a"])
        score(text.vae, list(zip(encoded, rows, strict=True)))


def _stamp(path: str) -> tuple[tuple[int, int], ...] | None:
    """Changes whenever a file of a model does; None where there is no whole one."""
    try:
        folder = find_model_dir(Path(path))
        facts = [(folder / name).stat() for name in ("config.json", "model.safetensors", "tokenizer.json")]
    except (VaeDistError, OSError):
        return None
    return tuple((one.st_mtime_ns, one.st_size) for one in facts)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
