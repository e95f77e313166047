"""What is done to a text before it is tokenised, in one place for the corpus and for texts given to a model later.

The steps are `tokenizers` normalizers: `Source.read` applies them, and they become part of tokenizer.json. Applying
them twice changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tokenizers import Regex, normalizers

from vae_dist.config.schema import PrepareConfig

_LOWERCASE = normalizers.Lowercase()
_FORMS = {"nfc": normalizers.NFC(), "nfkc": normalizers.NFKC()}
# Python's white space; four control characters are missing from \s.
_SPACE = r"[\s\x{1c}-\x{1f}]"
# Angle brackets are punctuation but for those of <unk>.
_PUNCTUATION = r"<(?!unk>)|(?<!<unk)>|[\p{P}$+=^`|~]"
_DIGIT = r"\p{Nd}"
_APOSTROPHE = r"(?<=\p{L})['’](?=\p{L})"


def normalising_steps(options: PrepareConfig) -> list[normalizers.Normalizer]:
    """The normalizers that `options` ask for, in order; empty when the text stays as it is."""
    steps: list[normalizers.Normalizer] = []
    form = _FORMS.get(options.unicode_form)
    if form is not None:
        steps.append(form)
    if options.lowercase:
        steps.append(_LOWERCASE)
    if options.strip_punctuation:
        steps.append(normalizers.Replace(Regex(_APOSTROPHE), ""))
    gaps = [_PUNCTUATION] * options.strip_punctuation + [_DIGIT] * options.strip_digits
    if gaps:
        steps.append(normalizers.Replace(Regex(f"(?:{'|'.join([_SPACE, *gaps])})+"), " "))
        steps.append(normalizers.Strip())
    if form is not None and len(steps) > 1:
        # Lower-casing and taking characters out can bring together what composes.
        steps.append(form)
    return steps


def normaliser(options: PrepareConfig) -> Callable[[str], str]:
    """A function from a text to its normal form, stripped of white space at its ends."""
    steps = normalising_steps(options)
    if not steps:
        return str.strip
    sequence = normalizers.Sequence(steps)
    return lambda text: str(sequence.normalize_str(text.strip())).strip()


def keyword_filter(keyword: str | None) -> Callable[[str], object] | None:
    """A test whether a text holds the keyword as a whole word, in any case, as `grep -iw` finds it; None for none."""
    if keyword is None:
        return None
    return re.compile(rf"(?<!\w){re.escape(keyword.strip())}(?!\w)", re.IGNORECASE).search


def lowercase(text: str) -> str:
    """Lower case exactly as the tokenizer does it (Python's differs in a few letters)."""
    return str(_LOWERCASE.normalize_str(text))
