"""The text in one field of a JSON object."""

from __future__ import annotations

from typing import Any

from vae_dist.errors import DataError


def text_of(
    record: Any, where: str, name: str, fix: str = "Set prepare.text_field to the one that holds the text."
) -> str:
    """The field `name` of a JSON object; null is an empty text.

    Args:
        where: the object's place, for messages.
        fix: what to do when there is no such field.

    Raises:
        DataError: the field is missing, no string, or holds half of a surrogate pair.
    """
    if not isinstance(record, dict) or name not in record:
        fields = ", ".join(record) if isinstance(record, dict) else f"no object but {type(record).__name__}"
        raise DataError(f"{where} has no field {name!r} (it has: {fields}). {fix}")
    text = record[name]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: field {name!r} is no string but {type(text).__name__}. Mend or remove the record.")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {name!r} holds half of a surrogate pair, \\u{ord(error.object[error.start]):04x}, which "
            "is no character. Mend or remove the record."
        ) from None
    return text or ""
