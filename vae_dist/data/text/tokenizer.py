"""Tokenizers: Hugging Face `tokenizers` files with four fixed special tokens.

<pad> = 0, <s> = 1, </s> = 2, <unk> = 3. Word level (a literal <unk> in the text is id 3, as in PTB), or byte-level
BPE or unigram (any text round-trips). The same texts give a byte-identical tokenizer.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.text.normalise import lowercase, normaliser, normalising_steps
from vae_dist.data.text.special_ids import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from vae_dist.data.text.unigram import train_unigram
from vae_dist.errors import DataError

__all__ = ["SPECIAL_TOKENS", "TRAINED_KINDS", "Tokenizer", "build_tokenizer", "lowercase"]

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
TRAINED_KINDS = ("word", "bpe", "unigram")
_SMALLEST_BYTE_LEVEL = len(SPECIAL_TOKENS) + 256
# No text is read as a special token, however likely the pieces of the text are.
_NEVER = -1e4
_WORDS = Regex(r"<unk>|\w+|[^\w\s]")
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

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts one after the other, in one piece, which is cheaper than an array for each.

        Returns:
            ids: uint32, the end of sequence last in each text and nowhere else.
            lengths: int64, ids of each text, its end of sequence included.
        """
        flat, lengths = array("I"), []
        for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False):
            ids = encoding.ids
            ids.append(EOS_ID)
            flat.fromlist(ids)
            lengths.append(len(ids))
        # The buffer is the array's own, and numpy reads no empty one.
        tokens = np.frombuffer(flat, dtype=np.uint32) if lengths else np.empty(0, dtype=np.uint32)
        counts = np.array(lengths, dtype=np.int64)
        # A word-level vocabulary holds the special tokens as words: spelled out in a text they are unknown words.
        np.maximum(tokens, UNK_ID, out=tokens)
        tokens[np.cumsum(counts) - 1] = EOS_ID
        return tokens, counts

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int64 ids of each text, the end of sequence last and nowhere else."""
        tokens, lengths = self.encode_flat(texts)
        return np.split(tokens.astype(np.int64), np.cumsum(lengths)[:-1]) if len(lengths) else []

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` up to the end of sequence; padding and beginning are left out, <unk> is shown."""
        numbers = np.asarray(ids, dtype=np.int64)
        numbers = numbers[: np.argmax(numbers == EOS_ID)] if (numbers == EOS_ID).any() else numbers
        kept = numbers[(numbers != PAD_ID) & (numbers != BOS_ID)].tolist()
        if not self._is_word_level:
            return self._inner.decode(kept, skip_special_tokens=False)
        words = " ".join(self._inner.id_to_token(token) or SPECIAL_TOKENS[UNK_ID] for token in kept)
        return _LOOSE.sub("", _CONTRACTION.sub("'", words)) if self._splits_punctuation else words

    def vocabulary(self) -> dict[str, int]:
        """Every token, as the file spells it, and its id."""
        return dict(self._inner.get_vocab())

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

    Normalisation becomes part of the tokenizer, so that text given to the model later is treated alike.

    Args:
        texts: the training split or a sample of it; read once, or not at all.
    """
    if options.tokenizer == "word":
        return _train_words(texts, options)
    if options.tokenizer in ("bpe", "unigram"):
        return _train_byte_level(texts, options)
    return _with_steps(Tokenizer.load(Path(options.tokenizer)), normalising_steps(options))


def _train_words(texts: Iterable[str], options: PrepareConfig) -> Tokenizer:
    is_tokenised = options.pre_tokenizer == "whitespace"
    words = pre_tokenizers.Split(_WORDS, behavior="removed", invert=True)
    pre_tokenizer = pre_tokenizers.WhitespaceSplit() if is_tokenised else words
    counts = _count(texts, pre_tokenizer, options)
    known = (word for word, count in counts.items() if count >= options.min_frequency)
    ranked = sorted((word for word in known if word not in SPECIAL_TOKENS), key=lambda word: (-counts[word], word))
    vocabulary = [*SPECIAL_TOKENS, *ranked[: options.vocab_size - len(SPECIAL_TOKENS)]]
    ids = {word: number for number, word in enumerate(vocabulary)}
    inner = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=SPECIAL_TOKENS[UNK_ID]))
    inner.pre_tokenizer = pre_tokenizer
    _normalise(inner, options)
    return Tokenizer(_json(inner))


def _train_byte_level(texts: Iterable[str], options: PrepareConfig) -> Tokenizer:
    if options.vocab_size < _SMALLEST_BYTE_LEVEL:
        raise DataError(
            f"prepare.vocab_size = {options.vocab_size} is too small for a byte-level tokenizer: the special tokens "
            f"and the 256 bytes need {_SMALLEST_BYTE_LEVEL}. Raise it."
        )
    model = models.BPE() if options.tokenizer == "bpe" else _unigram(texts, options)
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    _normalise(inner, options)
    if options.tokenizer == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=options.vocab_size,
            min_frequency=options.min_frequency,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
    return Tokenizer(_json(inner))


def _unigram(texts: Iterable[str], options: PrepareConfig) -> models.Unigram:
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts = _count(texts, pre_tokenizer, options)
    size = options.vocab_size - len(SPECIAL_TOKENS)
    pieces = train_unigram(counts, sorted(pre_tokenizer.alphabet()), size, options.min_frequency)
    return models.Unigram([*((token, _NEVER) for token in SPECIAL_TOKENS), *pieces], unk_id=UNK_ID)


def _count(texts: Iterable[str], pre_tokenizer: pre_tokenizers.PreTokenizer, options: PrepareConfig) -> Counter[str]:
    """How often each word, as the pre-tokenizer cuts them, occurs."""
    normalise = normaliser(options)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(normalise(text)))
    return counts


def _with_steps(tokenizer: Tokenizer, steps: list[normalizers.Normalizer]) -> Tokenizer:
    """A tokenizer that takes these steps first; unchanged when it takes them all already."""
    present = json.loads(tokenizer._bytes).get("normalizer") or {"normalizers": []}
    known = present.get("normalizers", [present])
    if all(_facts(step) in known for step in steps):
        return tokenizer
    inner = tokenizers.Tokenizer.from_str(tokenizer._bytes.decode("utf-8"))
    inner.normalizer = normalizers.Sequence([*steps, *([inner.normalizer] if inner.normalizer else [])])
    return Tokenizer(_json(inner))


def _facts(step: normalizers.Normalizer) -> object:
    """A step as tokenizer.json writes it."""
    return json.loads(step.__getstate__())


def _normalise(inner: tokenizers.Tokenizer, options: PrepareConfig) -> None:
    steps = normalising_steps(options)
    if steps:
        inner.normalizer = steps[0] if len(steps) == 1 else normalizers.Sequence(steps)


def _json(inner: tokenizers.Tokenizer) -> bytes:
    return inner.to_str(pretty=True).encode("utf-8")
