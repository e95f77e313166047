"""How much of a text comes back from its latent: BLEU by sacrebleu, token accuracy, exact matches.

A row is the token ids of a sequence, its end of sequence last if that was reached. BLEU needs words. Texts that are
tokenised already (PTB, and whatever else a word-level tokenizer splits at white space alone) are compared as they are,
sacrebleu's tokenizer `none`; all others, so also what a subword tokenizer decodes to, are decoded text and are split
by sacrebleu's default, `13a`. The signature, without which a BLEU says little, names the choice (Post 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU

Row = Sequence[int] | np.ndarray


def bleu_tokenizer(texts: Sequence[str], rows: Sequence[Row]) -> str:
    """`none` if the tokens of every text are its words at white space (and the end of sequence), else `13a`."""
    are_words = all(len(text.split()) + 1 == len(row) for text, row in zip(texts, rows, strict=True))
    return "none" if are_words else "13a"


def corpus_bleu(references: Sequence[str], outputs: Sequence[str], tokenizer: str) -> dict[str, Any]:
    """BLEU-4 of all outputs together (Papineni et al. 2002), one reference each.

    Args:
        references, outputs: texts, pairwise.
        tokenizer: of sacrebleu, see `bleu_tokenizer`.

    Returns:
        bleu, 0 to 100, and bleu_signature.
    """
    metric = BLEU(tokenize=tokenizer, force=True)
    score = metric.corpus_score(list(outputs), [list(references)]).score
    return {"bleu": float(score), "bleu_signature": str(metric.get_signature())}


def token_accuracy(references: Sequence[Row], outputs: Sequence[Row]) -> float:
    """Share of positions with the right token, over all texts together.

    A text counts max(length of reference, length of output) positions, the ends of sequence included, so an output
    that is too long or too short pays for it. One word left out shifts all behind it: see BLEU for those.
    """
    same = positions = 0
    for given, found in zip(references, outputs, strict=True):
        same += sum(a == b for a, b in zip(given, found, strict=False))
        positions += max(len(given), len(found))
    return same / positions if positions else 0.0


def exact_match(references: Sequence[Row], outputs: Sequence[Row]) -> float:
    """Share of outputs that are the reference, end of sequence included; 0.0 without any."""
    same = sum(list(a) == list(b) for a, b in zip(references, outputs, strict=True))
    return same / len(references) if len(references) else 0.0


def score_reconstructions(
    references: Sequence[Row], outputs: Sequence[Row], reference_texts: Sequence[str], output_texts: Sequence[str]
) -> dict[str, Any]:
    """bleu, bleu_signature, token_accuracy and exact_match of texts and what came back from their latents."""
    tokenizer = bleu_tokenizer(reference_texts, references)
    return {
        "sequences": len(references),
        **corpus_bleu(reference_texts, output_texts, tokenizer),
        "token_accuracy": token_accuracy(references, outputs),
        "exact_match": exact_match(references, outputs),
    }
