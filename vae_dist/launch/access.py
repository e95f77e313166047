"""Who may be spoken to: a Ray cluster executes what it is asked to, so one beyond this machine needs a token."""

from __future__ import annotations

import ipaddress
import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

from vae_dist.errors import MachineError

_OTHERS = 0o077


def require_token(address: str) -> None:
    """Check the way to the cluster at `address`, such as `10.0.0.1:6379`, `ray://host:10001` or `auto`.

    Raises:
        MachineError: it is not on loopback and no token is used, or others can read the file of the token.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        _require_private(_token_file())
    elif not _host_is_loopback(address):
        raise MachineError(
            f"RAY_ADDRESS = {address} is not on loopback, and no token is used: whoever reaches such a cluster can run "
            "anything on it. Start its nodes with RAY_AUTH_MODE=token, and set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH here (see cluster/README.md)."
        )


def own_token() -> None:
    """Ray's token file in the home directory, for a cluster started here: made, and readable by its owner alone."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return
    path = _token_file()
    if "RAY_AUTH_TOKEN_PATH" in os.environ:
        _require_private(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Ray would make one that everybody can read.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
    else:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")


def _require_private(path: Path) -> None:
    if "RAY_AUTH_TOKEN" in os.environ or not path.exists():
        return
    facts = path.stat()
    # What a cluster manager mounts belongs to another user and is its business.
    if facts.st_uid == os.getuid() and facts.st_mode & _OTHERS:
        raise MachineError(f"Others can read the token in {path}. Run: chmod 600 {path}")


def is_loopback(host: str) -> bool:
    """Whether a name or IP address is this machine's own, reached from nowhere else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_is_loopback(address: str) -> bool:
    return is_loopback(urlsplit(address if "://" in address else f"//{address}").hostname or "")
