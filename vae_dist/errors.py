"""Errors a user can act on: each says what is wrong, where, and the fix, and survives pickling across Ray."""

from __future__ import annotations

from vae_dist.config.credentials import without_credentials


class VaeDistError(Exception):
    """Base of every error whose message is meant for the user; the CLI prints it without a traceback.

    `exit_status` is 2 when the user's input is wrong and 1 when the run itself failed. The message is without the
    credentials of URLs in it.
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        self.message = without_credentials(message)
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type[VaeDistError], tuple[str]]:
        # Subclasses with their own constructor arguments would otherwise fail to unpickle on the driver.
        return (type(self), (self.message,))


class ConfigError(VaeDistError):
    """The configuration has unknown keys, wrong types, values out of range or combinations that cannot work."""


class DataError(VaeDistError):
    """A source or a data set directory is missing, damaged, empty or does not fit the configuration."""


class CheckpointError(VaeDistError):
    """No checkpoint of this run can be loaded, or a run directory belongs to another configuration."""


class ModelError(VaeDistError):
    """A model directory is missing, incomplete or damaged, or was asked for something it cannot do."""


class MachineError(VaeDistError):
    """The machine or cluster lacks something the run needs: a compiler, a package, free resources, a token."""


class OverloadedError(VaeDistError):
    """More was asked for than there is room for at present."""

    exit_status = 1


class RunError(VaeDistError):
    """The run was started correctly and failed."""

    exit_status = 1
