"""Text in pieces: whatever the tokens, the pieces make the text of the whole, and nothing is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import corpus
from tokenizers import decoders, models

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.text.pieces import Pieces
from vae_dist.data.text.special_ids import EOS_ID
from vae_dist.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer, build_tokenizer

TEXTS = [*corpus()[:200], "it's the captain's boat, isn't it? (so they say) [yes]", "grüße aus köln: 5 € für 漢字 😀"]


def word_pieces(folder: Path) -> Tokenizer:
    """A foreign tokenizer whose decoder joins and tidies words."""
    words = [*SPECIAL_TOKENS, "do", "no", "##t", "n", "'", "s", ".", ",", "we", "##ll", "!", "i"]
    inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.decoder = decoders.WordPiece(cleanup=True)
    path = folder / "tokenizer.json"
    inner.save(str(path))
    return Tokenizer.load(path)


@pytest.fixture(scope="module", params=["word", "bpe", "unigram", "word pieces"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "word pieces":
        return word_pieces(tmp_path_factory.mktemp("foreign"))
    options = PrepareConfig(tokenizer=request.param, vocab_size=400, pre_tokenizer="words")
    return build_tokenizer(TEXTS, options)


def cut(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    pieces = Pieces(tokenizer)
    return [pieces.add(token, i == len(tokens) - 1) for i, token in enumerate(tokens)]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_make_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(3, tokenizer.vocab_size - 1), min_size=1, max_size=30))
    assert "".join(cut(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_pieces_of_real_text_come_one_token_late_and_no_later(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        tokens = tokenizer.encode_batch([text])[0].tolist()
        assert tokens[-1] == EOS_ID
        pieces = cut(tokenizer, tokens)
        assert "".join(pieces) == tokenizer.decode(tokens)
        if text in corpus():
            for count in range(1, len(tokens)):
                assert "".join(pieces[:count]) == tokenizer.decode(tokens[: count - 1])


def test_a_long_text_is_cut_as_exactly_and_at_the_same_cost(tokenizer: Tokenizer) -> None:
    reads = []
    decode = tokenizer.decode

    class Counted(Tokenizer):
        def decode(self, ids: Sequence[int] | np.ndarray) -> str:
            reads.append(len(ids))
            return decode(ids)

    counted = Counted(tokenizer._bytes)
    random = np.random.default_rng(0)
    for _ in range(20):
        tokens = random.integers(3, tokenizer.vocab_size, 600).tolist()
        assert "".join(cut(counted, tokens)) == decode(tokens)
    assert np.mean(reads) < 60
