"""What may be shown or kept of a text that may hold URLs."""

from __future__ import annotations

import re

_HIDDEN = "***"
_USER_AND_PASSWORD = re.compile(
    # A password that should have been quoted may have any character; what is up to a slash is no port then.
    r"(?<=://)(?:[^/?#@\s'\":]*:(?!\d+[/?#])[^@\s'\"]*|[^/?#@\s'\"]*)@"
)
# Signed URLs carry their credentials in the query.
_QUERY = re.compile(
    r"([?&][\w.-]*(?:key|token|secret|password|credential|signature|sig|sas)=)[^&\s'\"]+", re.IGNORECASE
)


def without_credentials(text: str) -> str:
    """The text with user, password and signatures of its URLs replaced by ***."""
    return _QUERY.sub(rf"\1{_HIDDEN}", _USER_AND_PASSWORD.sub(f"{_HIDDEN}@", text))


def without_hidden(url: str) -> str:
    """A URL whose user and password were replaced by ***, without them: they are looked for in the environment."""
    return url.replace(f"{_HIDDEN}@", "")


def place(url: str) -> str:
    """Where a URL points to, however it is reached: without credentials and query."""
    return without_hidden(without_credentials(url)).partition("?")[0].rstrip("/")
