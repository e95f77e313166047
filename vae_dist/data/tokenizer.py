"""Tokenizers: Hugging Face `tokenizers` files with four fixed special tokens.

<pad> = 0, <s> = 1, </s> = 2, <unk> = 3. Word level (a literal <unk> in the text is id 3, as in PTB) or byte-level
BPE (any text round-trips). The same text gives a byte-identical tokenizer.json.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.batch import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from vae_dist.errors import DataError

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
# BPE merges are learned from at most so much text: the first texts of the (hash-ordered or given) source.
_BPE_TRAINING_CHARACTERS = 200_000_000
_WORDS = Regex(r"<unk>|\w+|[^\w\s]")


class Tokenizer:
    """Text to ids and back. Encoding adds the end of sequence and no beginning."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._is_word_level = isinstance(inner.model, models.WordLevel)

    @property
    def vocab_size(self) -> int:
        """Special tokens included."""
        return self._inner.get_vocab_size()

    @property
    def sha256(self) -> str:
        """Of the tokenizer.json that `save` writes."""
        return hashlib.sha256(self._json()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int64 ids of each text, the end of sequence last."""
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*e.ids, EOS_ID], dtype=np.int64) for e in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` up to the end of sequence; padding and beginning are left out, <unk> is shown."""
        kept: list[int] = []
        for token in map(int, ids):
            if token == EOS_ID:
                break
            if token not in (PAD_ID, BOS_ID):
                kept.append(token)
        if self._is_word_level:
            return " ".join(str(self._inner.id_to_token(token)) for token in kept)
        return self._inner.decode(kept, skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write tokenizer.json, atomically."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(self._json())
        os.replace(temporary, path)

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            DataError: it is missing, unreadable, or lacks the special tokens at ids 0 to 3.
        """
        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"There is no tokenizer {path}. Train one with `vae-dist tokenizer train`.") from None
        except Exception as error:  # the Rust side raises bare Exception
            raise DataError(f"{path} is not a Hugging Face tokenizer file: {error}.") from None
        found = [inner.token_to_id(token) for token in SPECIAL_TOKENS]
        if found != [PAD_ID, BOS_ID, EOS_ID, UNK_ID]:
            raise DataError(
                f"{path} must have the special tokens {', '.join(SPECIAL_TOKENS)} at ids 0, 1, 2, 3; it has them at "
                f"{found}. Train one with `vae-dist tokenizer train`."
            )
        return Tokenizer(inner)

    def _json(self) -> bytes:
        return self._inner.to_str(pretty=True).encode("utf-8")


def build_tokenizer(texts: Iterable[str], options: PrepareConfig) -> Tokenizer:
    """Train the tokenizer that `options.tokenizer` asks for, or load it when that is a path.

    Args:
        texts: the training split, lower-cased already where that is asked for; read once.
    """
    if options.tokenizer == "word":
        return _train_words(texts, options)
    if options.tokenizer == "bpe":
        return _train_bpe(texts, options)
    return Tokenizer.load(Path(options.tokenizer))


def _train_words(texts: Iterable[str], options: PrepareConfig) -> Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS[UNK_ID]))
    inner.pre_tokenizer = (
        pre_tokenizers.WhitespaceSplit()
        if options.pre_tokenizer == "whitespace"
        else pre_tokenizers.Split(_WORDS, behavior="removed", invert=True)
    )
    _normalise(inner, options)
    counts: Counter[str] = Counter()
    for text in texts:
        normal = inner.normalizer.normalize_str(text) if inner.normalizer else text
        counts.update(piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str(normal))
    ranked = sorted(
        (word for word, count in counts.items() if count >= options.min_frequency and word not in SPECIAL_TOKENS),
        key=lambda word: (-counts[word], word),
    )
    vocabulary = [*SPECIAL_TOKENS, *ranked[: options.vocab_size - len(SPECIAL_TOKENS)]]
    inner.model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL_TOKENS[UNK_ID])
    return Tokenizer(inner)


def _train_bpe(texts: Iterable[str], options: PrepareConfig) -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    _normalise(inner, options)
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=options.min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_bounded(texts, _BPE_TRAINING_CHARACTERS), trainer)
    return Tokenizer(inner)


def _normalise(inner: tokenizers.Tokenizer, options: PrepareConfig) -> None:
    """Lower-casing belongs to the tokenizer, so that text given to the model later is treated alike."""
    if options.lowercase:
        inner.normalizer = normalizers.Lowercase()


def _bounded(texts: Iterable[str], characters: int) -> Iterable[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text
