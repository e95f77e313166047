"""Tokenizers: Hugging Face `tokenizers` files with four fixed special tokens.

<pad> = 0, <s> = 1, </s> = 2, <unk> = 3. Word level (a literal <unk> in the text is id 3, as in PTB) or byte-level
BPE (any text round-trips). The same texts give a byte-identical tokenizer.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import xxhash
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.special_ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from vae_dist.errors import DataError

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
TRAINED_KINDS = ("word", "bpe")
# BPE merges are learned from a sample of about so many characters, which bounds memory.
_BPE_SAMPLE_CHARACTERS = 1 << 26
_BPE_SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
_WORDS = Regex(r"<unk>|\w+|[^\w\s]")
_LOWERCASE = normalizers.Lowercase()
_CONTRACTION = re.compile(r"(?<=\w) ' (?=(?:s|t|re|ve|ll|d|m)\b)")
_LOOSE = re.compile(r" (?=[.,;:!?)\]}%])|(?<=[(\[{]) ")


class Tokenizer:
    """Text to ids and back. Encoding adds the end of sequence and no beginning."""

    def __init__(self, file_bytes: bytes) -> None:
        """From the bytes of a tokenizer.json with the special tokens in place; see `load`."""
        self._bytes = file_bytes
        self._inner = tokenizers.Tokenizer.from_str(file_bytes.decode("utf-8"))
        # What a file asks for here would cut or pad sequences behind our back.
        self._inner.no_truncation()
        self._inner.no_padding()
        # A text that spells </s> is text, not the end of a sequence.
        self._inner.encode_special_tokens = True
        self.vocab_size = 1 + max(self._inner.get_vocab().values(), default=-1)
        self.sha256 = hashlib.sha256(file_bytes).hexdigest()
        self._is_word_level = isinstance(self._inner.model, models.WordLevel)
        self._splits_punctuation = isinstance(self._inner.pre_tokenizer, pre_tokenizers.Split)

    pad_id, bos_id, eos_id, unk_id = PAD_ID, BOS_ID, EOS_ID, UNK_ID

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int64 ids of each text, the end of sequence last and nowhere else."""
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        # A word-level vocabulary holds the special tokens as words: spelled out in a text they are unknown words.
        return [np.array([*(max(i, UNK_ID) for i in e.ids), EOS_ID], dtype=np.int64) for e in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` up to the end of sequence; padding and beginning are left out, <unk> is shown."""
        kept: list[int] = []
        for token in map(int, ids):
            if token == EOS_ID:
                break
            if token not in (PAD_ID, BOS_ID):
                kept.append(token)
        if not self._is_word_level:
            return self._inner.decode(kept, skip_special_tokens=False)
        words = " ".join(self._inner.id_to_token(token) or SPECIAL_TOKENS[UNK_ID] for token in kept)
        return _LOOSE.sub("", _CONTRACTION.sub("'", words)) if self._splits_punctuation else words

    def save(self, path: Path) -> None:
        """Write tokenizer.json, atomically."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(self._bytes)
        os.replace(temporary, path)

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            DataError: it is missing, unreadable, or lacks the special tokens at ids 0 to 3.
        """
        if not path.is_file():
            raise DataError(f"There is no tokenizer {path}. Train one with `vae-dist tokenizer train`.")
        try:
            file_bytes = path.read_bytes()
            inner = tokenizers.Tokenizer.from_str(file_bytes.decode("utf-8"))
        except Exception as error:  # the Rust side raises bare Exception
            raise DataError(
                f"{path} is not a Hugging Face tokenizer file: {error}. Train one with `vae-dist tokenizer train`."
            ) from None
        found = [inner.token_to_id(token) for token in SPECIAL_TOKENS]
        if found != [PAD_ID, BOS_ID, EOS_ID, UNK_ID]:
            raise DataError(
                f"{path} must have the special tokens {', '.join(SPECIAL_TOKENS)} at ids 0, 1, 2, 3; it has them at "
                f"{found}. Train one with `vae-dist tokenizer train`."
            )
        return Tokenizer(file_bytes)


def build_tokenizer(texts: Iterable[str], options: PrepareConfig) -> Tokenizer:
    """Train the tokenizer that `options.tokenizer` asks for, or load it when that is a path.

    Lower-casing becomes part of the tokenizer, so that text given to the model later is treated alike.

    Args:
        texts: the training split; read once, or not at all.
    """
    if options.tokenizer == "word":
        return _train_words(texts, options)
    if options.tokenizer == "bpe":
        return _train_bpe(texts, options)
    tokenizer = Tokenizer.load(Path(options.tokenizer))
    return _with_lowercase(tokenizer) if options.lowercase else tokenizer


def lowercase(text: str) -> str:
    """Lower case exactly as the tokenizer does it (Python's differs in a few letters)."""
    return _LOWERCASE.normalize_str(text)


def _train_words(texts: Iterable[str], options: PrepareConfig) -> Tokenizer:
    is_tokenised = options.pre_tokenizer == "whitespace"
    words = pre_tokenizers.Split(_WORDS, behavior="removed", invert=True)
    pre_tokenizer = pre_tokenizers.WhitespaceSplit() if is_tokenised else words
    counts: Counter[str] = Counter()
    for text in texts:
        normal = lowercase(text) if options.lowercase else text
        counts.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(normal))
    known = (word for word, count in counts.items() if count >= options.min_frequency)
    ranked = sorted((word for word in known if word not in SPECIAL_TOKENS), key=lambda word: (-counts[word], word))
    vocabulary = [*SPECIAL_TOKENS, *ranked[: options.vocab_size - len(SPECIAL_TOKENS)]]
    ids = {word: number for number, word in enumerate(vocabulary)}
    inner = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=SPECIAL_TOKENS[UNK_ID]))
    inner.pre_tokenizer = pre_tokenizer
    _normalise(inner, options)
    return Tokenizer(_json(inner))


def _train_bpe(texts: Iterable[str], options: PrepareConfig) -> Tokenizer:
    if options.vocab_size < _BPE_SMALLEST_VOCABULARY:
        raise DataError(
            f"prepare.vocab_size = {options.vocab_size} is too small for byte-level BPE: the special tokens and the "
            f"256 bytes need {_BPE_SMALLEST_VOCABULARY}. Raise it."
        )
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
    inner.train_from_iterator(sample_texts(texts, _BPE_SAMPLE_CHARACTERS), trainer)
    return Tokenizer(_json(inner))


def sample_texts(texts: Iterable[str], characters: int) -> list[str]:
    """All texts, or a sample of them with at most so many characters, chosen by hash wherever they stand."""
    kept: list[tuple[int, str]] = []
    size, limit = 0, 1 << 64
    for text in texts:
        digest = xxhash.xxh3_64_intdigest(text.encode())
        if digest < limit:
            kept.append((digest, text))
            size += len(text)
        while size > characters:
            limit //= 2
            kept = [(digest, text) for digest, text in kept if digest < limit]
            size = sum(len(text) for _, text in kept)
    return [text for _, text in kept]


def _with_lowercase(tokenizer: Tokenizer) -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(tokenizer._bytes.decode("utf-8"))
    present = json.loads(tokenizer._bytes).get("normalizer") or {"type": None}
    if any(step["type"] == "Lowercase" for step in present.get("normalizers", [present])):
        return tokenizer
    inner.normalizer = normalizers.Sequence([_LOWERCASE, inner.normalizer]) if inner.normalizer else _LOWERCASE
    return Tokenizer(_json(inner))


def _normalise(inner: tokenizers.Tokenizer, options: PrepareConfig) -> None:
    if options.lowercase:
        inner.normalizer = _LOWERCASE


def _json(inner: tokenizers.Tokenizer) -> bytes:
    return inner.to_str(pretty=True).encode("utf-8")
