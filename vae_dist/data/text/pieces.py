"""The text of a sequence while it is being written."""

from __future__ import annotations

from itertools import takewhile

from vae_dist.data.text.tokenizer import Tokenizer

# What bytes decode to that are no character yet.
_INCOMPLETE = "\ufffd"
# A text that begins in the middle may begin with the rest of a character or without its space.
_CUT = " " + _INCOMPLETE
_MOST, _KEPT = 48, 16


class Pieces:
    """Cuts the text of growing tokens into pieces that are never taken back: together they are the whole's text.

    A token may change how the one before it reads: a part of a character, an apostrophe that becomes a contraction,
    a bracket that loses a space. A piece is therefore what two readings in succession agree on.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._tokens = tokenizer, list[int]()
        self._before, self._given = "", 0

    def add(self, token: int, is_last: bool) -> str:
        """What is certain of the text with another token, without what was given before; perhaps nothing."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        certain = text if is_last else _agreed(self._before, text).rstrip(_INCOMPLETE)
        self._before = text
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if len(self._tokens) >= _MOST:
            self._forget()
        return piece

    def _forget(self) -> None:
        """Read on from the last tokens alone, where they read as they did, so that a token costs the same anywhere."""
        kept = self._tokens[-_KEPT:]
        text, waiting = self._tokenizer.decode(kept), len(self._before) - self._given
        same = text.lstrip(_CUT)
        if len(same) > waiting and self._before.endswith(same):
            self._tokens, self._before, self._given = kept, text, len(text) - waiting


def _agreed(before: str, text: str) -> str:
    """Their common beginning."""
    return text[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False)))]
