"""Asking an object store again, as long as it is sensible.

A request that breaks off, stalls or is refused for load is repeated after a pause that grows and is drawn at random
("full jitter", Brooker 2015, "Exponential backoff and jitter", AWS Architecture Blog), so that many workers do not
return to an overloaded store at the same moment.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from vae_dist.errors import DataError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_WARNING_SECONDS = 10.0
# The second: a store that is read only, such as a web server.
_FOR_GOOD = (PermissionError, NotImplementedError)
# The S3 client raises the same class for all errors.
_DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN|NO_SUCH_BUCKET|HTTP status 40[13]"
    r"|\b40[13] Forbidden"
)


@dataclass(frozen=True)
class RetryPolicy:
    """How long an object store is asked.

    Attributes:
        attempts: requests in a row that fail before the work is given up.
        first_delay_seconds, max_delay_seconds: bounds of the pause, which doubles from the first to the last.
        attempt_seconds: a request that takes longer is abandoned and counts as failed.
        deadline_seconds: of one piece of work, all its requests and pauses.
        read_bytes: largest read.
    """

    attempts: int = 48
    first_delay_seconds: float = 0.1
    max_delay_seconds: float = 10.0
    attempt_seconds: float = 30.0
    deadline_seconds: float = 180.0
    read_bytes: int = 4 * 2**20


class Retries:
    """Repeats what fails, and says so at most every ten seconds. Threads may share one.

    Attributes:
        count: requests repeated so far.
    """

    def __init__(self, policy: RetryPolicy, is_remote: bool, deed: str = "read") -> None:
        """`deed` is the participle in messages: "X cannot be read"."""
        self.policy, self.is_remote, self.count = policy, is_remote, 0
        self._deed = deed
        self._lock = threading.Lock()
        self._quiet_until = 0.0

    def ask(self, where: str, operation: Callable[[], _T]) -> _T:
        """An operation that takes one request, repeated while it fails.

        Raises:
            FileNotFoundError, NotADirectoryError: as the operation does.
            DataError: it fails for good; names `where` and what happened last.
        """
        tries = Tries(self.policy)
        while True:
            try:
                return within(tries.seconds, operation) if self.is_remote else operation()
            except (FileNotFoundError, NotADirectoryError):
                raise
            except Exception as error:
                self.failed(tries, where, error)

    def failed(self, tries: Tries, where: str, error: Exception) -> None:
        """Wait until it is time for the next attempt.

        Raises:
            DataError: there is none.
        """
        tries.failures += 1
        tries.in_a_row += 1
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if not self.is_remote or isinstance(error, _FOR_GOOD) or _DENIED.search(reason):
            raise DataError(
                f"{where} cannot be {self._deed}: {reason}. Check the permissions, the credentials and the address."
            ) from None
        delay = random.uniform(0, tries.longest_delay())
        spent = time.monotonic() - tries.began
        if tries.in_a_row >= self.policy.attempts or spent + delay >= self.policy.deadline_seconds:
            raise DataError(
                f"{where} cannot be {self._deed}: {tries.failures} requests failed in {spent:.1f} s, the last with: "
                f"{reason}. Check the network and the state of the store, then start again."
            ) from None
        with self._lock:
            self.count += 1
            is_quiet, now = time.monotonic() < self._quiet_until, time.monotonic()
            self._quiet_until = self._quiet_until if is_quiet else now + _WARNING_SECONDS
        level = logging.DEBUG if is_quiet else logging.WARNING
        logger.log(level, "%s asked again in %.2f s (retry %d): %s", where, delay, self.count, reason)
        time.sleep(delay)


class Tries:
    """What one piece of work has been through."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy, self.began, self.failures, self.in_a_row = policy, time.monotonic(), 0, 0

    @property
    def seconds(self) -> float:
        """What the next request may take."""
        left = self.began + self._policy.deadline_seconds - time.monotonic()
        return max(0.0, min(self._policy.attempt_seconds, left))

    def longest_delay(self) -> float:
        """Upper bound of the next pause."""
        return min(self._policy.max_delay_seconds, self._policy.first_delay_seconds * 2 ** (self.in_a_row - 1))


def within(seconds: float, operation: Callable[[], _T]) -> _T:
    """Run a request in a thread of its own and wait for it so long.

    The thread of a request that took longer cannot be stopped; it ends with its connection, unheard.

    Raises:
        TimeoutError: it took longer.
    """
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(operation())
        except BaseException as error:  # handed to the caller, who raises it
            answer.set_exception(error)

    threading.Thread(target=run, name="store-request", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():
            return answer.result()
        raise TimeoutError(f"no answer within {seconds:.1f} s") from None
