"""A probe looks at one container and says what it sees. A runtime with processes of its own brings its own."""

import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

from limpet.recovery.bundles import observe_bundle
from limpet.recovery.evidence import Boot, Bundle, Observation, Process
from limpet.recovery.host import Compare, compare, is_runtime_init, observe_boot, observe_process
from limpet.schema.file_name import file_name
from limpet.schema.identity import ProcessIdentity
from limpet.schema.metadata import Metadata
from limpet.schema.status import Status


class Subject(Protocol):
    """A container as a probe is shown it: its status is the checkpoint, unverified."""

    @property
    def id(self) -> str:
        """The container's id."""

    @property
    def status(self) -> Status:
        """What was last checkpointed, flagged Unknown if it is not verified."""

    @property
    def metadata(self) -> Metadata:
        """The immutable part; read from disk when asked for."""


class Probe(Protocol):
    """Looks at a container without touching anything.

    An exception that comes out of `observe` makes that one container Unknown, with the exception's message.
    """

    def observe(self, container: Subject) -> Observation:
        """Return what became of the container's process and bundle."""


class Witnessed(NamedTuple):
    """What somebody who was there says of a container's process."""

    process: Process
    """ALIVE, PAUSED or MONITOR_GONE; ENDED with its exit code, GONE if nobody saw that; HELD or NEVER_RAN if its
    program was not executed."""
    exit_code: int | None = None
    finished_at: int = 0
    """Nanoseconds since the epoch; 0 if not known."""
    is_out_of_memory: bool = False
    """The kernel has killed a process of it for want of memory."""
    detail: str = ""
    """With NEVER_RAN: why."""


Witness = Callable[[str, ProcessIdentity | None], Witnessed | None]
"""Asked for a container by id and its recorded process; answers None if it knows nothing of that very process.

A record that names no process is asked for, too: then ALIVE says that one runs nevertheless.
"""


class HostProbe:
    """Looks at processes of this host and, if they are kept here, at bundles in `containers_dir`.

    `witness`, such as the parent of the containers, knows ends that nobody else saw, and which process is which where
    the kernel gives no proof.
    """

    def __init__(
        self,
        containers_dir: str = "",
        *,
        witness: Witness = lambda _id, _identity: None,
        compare: Compare = compare,
        observe_boot: Callable[[ProcessIdentity | None], Boot] = observe_boot,
    ) -> None:
        self._containers_dir = containers_dir
        self._witness = witness
        self._compare = compare
        self._observe_boot = observe_boot

    def observe(self, container: Subject) -> Observation:
        """Return what the kernel, the file system and the witness say of the container."""
        identity = container.status.identity
        bundle, bundle_detail = Bundle.NOT_KEPT, ""
        if self._containers_dir:
            bundle, bundle_detail = observe_bundle(
                os.path.join(self._containers_dir, file_name(container.id)), container.id
            )
        boot, seen = self._observe_process(identity)
        if not container.status.finished_at:
            # Asked after the look: what has ended in between is known to it.
            seen = _believe(identity, seen, self._witness(container.id, identity))
        return Observation(
            boot=boot,
            process=seen.process,
            bundle=bundle,
            exit_code=seen.exit_code,
            finished_at=seen.finished_at,
            is_out_of_memory=seen.is_out_of_memory,
            detail="; ".join(filter(None, (seen.detail, bundle_detail))),
        )

    def _observe_process(self, identity: ProcessIdentity | None) -> tuple[Boot, Witnessed]:
        if identity is None:
            return Boot.SAME, Witnessed(Process.NONE)
        boot = self._observe_boot(identity)
        if boot is Boot.SAME:
            is_held = is_runtime_init(identity.pid)  # asked first: what is reaped amid the look has no name any more
            process, exit_code, detail = observe_process(identity, self._compare)
            if is_held and process is Process.ALIVE:
                return boot, Witnessed(Process.UNPROVEN, detail=_HELD)
            if is_held and process is Process.ENDED:
                return boot, Witnessed(Process.GONE)  # the code is a runtime's, not its program's
            return boot, Witnessed(process, exit_code, detail=detail)
        # A pid of another boot names another process; without a boot id it may.
        return boot, Witnessed(Process.GONE if boot is Boot.CHANGED else Process.HIDDEN)


def _believe(identity: ProcessIdentity | None, seen: Witnessed, witnessed: Witnessed | None) -> Witnessed:
    """Return what is true, from what was seen and what a witness says, if it says anything."""
    if witnessed is None:
        return seen
    if identity is None:
        # It should have no process. After a database was restored from a backup it may; of an end that was witnessed
        # it is not known whose it was.
        is_alive = witnessed.process in _LIVING
        return Witnessed(Process.UNPROVEN, detail="a process of it is said to run") if is_alive else seen
    if witnessed.process is Process.GONE and seen.process is Process.STRANGER:
        return seen  # it says the same, and why
    if witnessed.process not in _LIVING | {Process.HELD}:
        return witnessed
    is_closer = seen.process is Process.ALIVE and witnessed.process is not Process.ALIVE
    return witnessed if is_closer or seen.process is Process.UNPROVEN else seen


_HELD = "a runtime has made it, and holds it before its program is executed"
_LIVING = {Process.ALIVE, Process.PAUSED, Process.MONITOR_GONE}
