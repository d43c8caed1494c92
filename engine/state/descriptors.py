"""The limit of file descriptors: raised to what we may have, and told as an error where it is not enough."""

import errno
import fcntl
import os
import resource
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from limpet.schema.errors import DiskFullError, LimpetError, ResourcesError, StateDirectoryError, quote_path

NOTICED_SECONDS = 5.0
"""After so long a thread that sleeps sees that somebody has closed its descriptors: nothing wakes it then."""
_LAST_STANDARD = 2
_LOOKED_AT_FOR_EACH = 4
_original: tuple[int, int] | None = None


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit to the hard one: each container that runs takes a descriptor of ours."""
    global _original  # noqa: PLW0603  # it is the process's
    with suppress(OSError, ValueError):  # a sandbox around us: we do with what there is
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            _original = soft, hard


def original_descriptor_limit() -> tuple[int, int]:
    """Return the soft and the hard limit as they were before `raise_descriptor_limit`, for what we start.

    If the host program has set others since, those are what it wants.
    """
    now = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _original if _original is not None and now == (_original[1], _original[1]) else now


def fill_standard_numbers() -> None:
    """Open /dev/null as each of 0, 1 and 2 that is closed, so that no file of ours has the number of a standard stream.

    A host program that was started without them may give itself some later (dup2(2)): that would close our file, a lock
    perhaps, and what is printed would be written to it.
    """
    with suppress(OSError):  # who opens what is needed then fails, and says why
        while (number := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= _LAST_STANDARD:
            pass
        os.close(number)


def has_free_descriptors(count: int) -> bool:
    """Return whether this process could open so many more files now, as far as the highest numbers tell.

    The lowest free number is given away first, so the free ones are at the top. None is taken to find that out: it
    could be the last one that another thread needs just then.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = 0
    for number in range(limit - 1, max(limit - 1 - _LOOKED_AT_FOR_EACH * count, -1), -1):
        try:
            fcntl.fcntl(number, fcntl.F_GETFD)
        except OSError:
            free += 1
        if free == count:
            return True
    return False


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors to which nothing was written: each is closed, also where an error is reported (close(2))."""
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)


_FULL = {errno.ENOSPC, errno.EDQUOT}
_ADVICE = {
    errno.EROFS: "; the file system is read-only: see in the kernel's messages why, and mount it writable",
    errno.EIO: "; the disk has failed: look at the kernel's messages",
}


@contextmanager
def system_errors_told(what: str) -> Iterator[None]:
    """Let no bare OSError out of the block: a caller catches LimpetErrors. `what` begins the message."""
    try:
        yield
    except LimpetError:
        raise
    except OSError as error:
        if is_of_handler(error):
            raise
        raise to_limpet_error(what, error) from error


def is_of_handler(error: OSError) -> bool:
    """Say whether an error is one that a signal handler of the host program has raised, such as its TimeoutError.

    They run in the main thread; and what the system refuses has a number.
    """
    return error.errno is None and threading.get_ident() == threading.main_thread().ident


@contextmanager
def system_errors_passed_over() -> Iterator[None]:
    """Leave the block where the system refuses something; what a signal handler of the host program raises goes on."""
    try:
        yield
    except OSError as error:
        if is_of_handler(error):
            raise


def is_of_disk(error: OSError) -> bool:
    """Say whether the disk refuses everybody: it is full, or read-only, or fails."""
    return error.errno in _FULL or error.errno in _ADVICE


def to_limpet_error(what: str, error: OSError) -> LimpetError:
    """Return what `system_errors_told` raises for an error."""
    where = f"{quote_path(error.filename)}: " if error.filename else ""
    reason = error.strerror or os.strerror(error.errno or errno.EIO)
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        whose = f"this process (RLIMIT_NOFILE: {soft} of {hard})" if error.errno == errno.EMFILE else "this machine"
        return ResourcesError(
            f"{what}: {where}no file descriptor is free in {whose}; raise the limit (ulimit -n, systemd: LimitNOFILE=)"
            " and try again"
        )
    if error.errno in _FULL:
        return DiskFullError(f"{what}: {where}{reason}; free some space (or inodes), then call again")
    return StateDirectoryError(f"{what}: {where}{reason}{_ADVICE.get(error.errno or 0, '')}")
