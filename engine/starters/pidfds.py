"""Holding a process that was started before: a pidfd of the very one, or none."""

import errno
import os
from collections.abc import Callable

from limpet.engine.state.descriptors import has_free_descriptors, is_of_handler
from limpet.recovery.host import read_pid_namespace
from limpet.schema.errors import NotFoundError, ResourcesError
from limpet.schema.identity import ProcessIdentity

KEPT_DESCRIPTORS = 16
"""How many stay free when the processes of containers are watched by descriptor."""


def adopt_process(identity: ProcessIdentity, why_not: Callable[[int], str]) -> int:
    """Return a pidfd of the process, unless `why_not` gives a reason against the one behind it.

    `why_not` may raise OSError. Raises NotFoundError if the process is not there, ResourcesError if that cannot be seen
    now, or no descriptor is left but those kept for steps.
    """
    if not has_free_descriptors(KEPT_DESCRIPTORS):
        raise ResourcesError(f"process {identity.pid}: the last descriptors are kept for steps and looks")
    try:
        pidfd = os.pidfd_open(identity.pid)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
            raise ResourcesError(f"process {identity.pid}: {error.strerror}") from error
        raise NotFoundError(f"process {identity.pid}: {_or_elsewhere(identity, error.strerror)}") from error
    try:
        reason = why_not(pidfd)
    except BaseException as error:
        os.close(pidfd)
        if isinstance(error, OSError) and not is_of_handler(error):
            raise ResourcesError(f"process {identity.pid} cannot be looked at: {error.strerror}") from error
        raise
    if reason:
        os.close(pidfd)
        raise NotFoundError(
            f"process {identity.pid} cannot be shown to be the container's: {_or_elsewhere(identity, reason)}"
        )
    return pidfd


def _or_elsewhere(identity: ProcessIdentity, reason: str | None) -> str | None:
    """Return why it is not the process, or that its number is of another pid namespace: here it is somebody else's."""
    here = read_pid_namespace()
    if here == identity.pid_namespace:
        return reason
    return f"that number is of pid namespace {identity.pid_namespace}, this is {here or 'not readable'}"
