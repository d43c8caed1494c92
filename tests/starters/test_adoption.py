"""A process that was started before is held by a pidfd, or it is said why not; no descriptor is left behind."""

import errno
import os
import resource
import subprocess
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from limpet.engine import errors
from limpet.engine.starters.pidfds import adopt_process
from limpet.recovery import host
from limpet.schema import ProcessIdentity


@pytest.fixture
def identity() -> Iterator[ProcessIdentity]:
    process = subprocess.Popen(["sleep", "1000"])
    with host.open_pidfd(process.pid) as pidfd:
        yield host.identify(process.pid, pidfd)
    process.kill()
    process.wait()


def test_the_very_process_is_held_or_none(identity: ProcessIdentity) -> None:
    """By a pidfd of it; what cannot be shown to be it, and what cannot be looked at, is let go of."""

    def fail(pidfd: int) -> str:
        raise InterruptedError("a signal's")

    def see_nothing(pidfd: int) -> str:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.NotFoundError, match="cannot be shown to be the container's: it began later"):
        adopt_process(identity, lambda _: "it began later")
    elsewhere = replace(identity, pid_namespace=1)
    with pytest.raises(errors.NotFoundError, match="that number is of pid namespace 1, this is "):
        adopt_process(elsewhere, lambda _: "pid 7 was reused")
    with pytest.raises(InterruptedError):
        adopt_process(identity, fail)
    with pytest.raises(errors.ResourcesError, match="cannot be looked at: Operation not permitted"):
        adopt_process(identity, see_nothing)
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(errors.NotFoundError, match="No such process"):
        adopt_process(replace(identity, pid=gone.pid), lambda _: "")
    assert set(os.listdir("/proc/self/fd")) == before
    pidfd = adopt_process(identity, lambda _: "")
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="utf-8") as file:
        assert f"Pid:\t{identity.pid}\n" in file
    os.close(pidfd)


def test_the_last_descriptors_are_not_taken(identity: ProcessIdentity) -> None:
    """They are kept for steps and looks: who adopts is told that there are none."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, limits[1]))
    try:
        with pytest.raises(errors.ResourcesError, match="kept for steps"):
            adopt_process(identity, lambda _: "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    os.close(adopt_process(identity, lambda _: ""))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_cannot_be_held_for_want_of_something_is_not_gone(
    identity: ProcessIdentity, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Others may take the last descriptor meanwhile: nothing is said of the process then."""

    def fail(pid: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", fail)
    with pytest.raises(errors.ResourcesError, match=os.strerror(number)):
        adopt_process(identity, lambda _: "")
