"""What an engine asks of a starter: how a container's process comes to be, is seen, signalled and cleaned up after.

prepare, checkpoint, go: the process is made but held, its identity is written to disk, and only then it may run. A
kill between any two of these leaves no process that the store does not know.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from limpet.recovery.probe import Probe
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.identity import ProcessIdentity
from limpet.schema.metadata import Metadata, SandboxMetadata
from limpet.schema.status import Resources


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One container that is to run, and where."""

    id: str
    bundle_path: str
    """Its bundle. The image, if it has layers, is unpacked in `rootfs` there."""
    metadata: Metadata
    sandbox: SandboxMetadata | None
    """None if the sandbox's record is damaged."""
    log_directory: str = ""
    """Where the logs of the sandbox's containers are, empty if that is not known; `log_path` is below it."""
    namespaces: Mapping[str, str] = field(default_factory=dict)
    """The path of each namespace that the sandbox holds, by type as in the OCI runtime spec."""
    target: ProcessIdentity | None = None
    """The first process of the container whose pid namespace it asks to see, if that one runs in its sandbox."""
    secret_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables of this start alone, over all others; never written down, nor shown."""

    @property
    def log_path(self) -> str:
        """Where its output goes; empty if it goes nowhere."""
        return self.metadata.log_path

    @property
    def resources(self) -> LinuxContainerResources | None:
        """The limits that its config asks for."""
        linux = self.metadata.config.linux
        return linux.resources if linux else None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A process that exists and is held: it has not run a line of the user's program."""

    identity: ProcessIdentity
    pidfd: int
    """Readable once the process has ended. `Starter.abort` closes it, and `go` if it fails; then the watcher does."""
    monitor: int = -1
    """The same of the process that sees its end; -1 if there is none, or if that is to be asked (`Monitored`)."""
    resources: Resources | None
    """Which limits are in force; None if none were asked for."""
    own: object = None
    """What the starter needs to let it go; nobody else looks at it."""


class Exit(NamedTuple):
    """How a container's process ended, as the starter, or whoever it asks, has seen it."""

    code: int | None
    """Of the program, 128 + signal if one ended it; None if nobody saw it."""
    finished_at: int = 0
    """Nanoseconds since the epoch, 0 if nobody saw it end."""
    never_ran: str = ""
    """Why the program was never executed, so that there is no exit code of it; empty if it was."""
    is_out_of_memory: bool = False
    """True if the kernel has killed a process of it for want of memory."""
    is_all: bool = False
    """True if it is known that nothing else is left of the container; False says nothing."""


class Starter(Protocol):
    """Starts, finds again, signals and cleans up after the containers of an engine. Thread-safe."""

    @property
    def name(self) -> str:
        """Its name, which each container's metadata keeps."""

    def open(self, state_dir: str) -> None:
        """Begin to serve the engine of this state directory, before anything else is asked."""

    def close(self) -> None:
        """Serve it no longer; its containers run on. May be repeated."""

    def make_config(self, launch: Launch) -> bytes:
        """Return the content of the bundle's config.json: what is to be run, in this starter's words.

        Raises InvalidInputError for a config that it cannot carry out.
        """

    def find_unapplied(self, launch: Launch) -> dict[str, str]:
        """Return the name of each field of the config, or sandbox's config, that asks for what is not done, and why."""

    def keeps(self, container_id: str) -> bool:
        """Say whether it has anything of this container, whose record may be damaged."""

    def prepare(self, launch: Launch) -> Prepared:
        """Make the process and hold it. Raises StartError, StateDirectoryError for a damaged bundle."""

    def go(self, prepared: Prepared) -> None:
        """Let it run; returns once the program is executed. Raises StartError if it is not: nothing is left then."""

    def abort(self, prepared: Prepared) -> None:
        """End a process that is still held, and wait until it is gone."""

    def adopt(self, container_id: str, identity: ProcessIdentity) -> int:
        """Return a pidfd of the very process, running or just ended.

        Raises NotFoundError if it is not there, ResourcesError if no descriptor is left.
        """

    def signal(self, container_id: str, identity: ProcessIdentity, number: int, *, only_session: bool = False) -> int:
        """Send a signal to all processes of the container, 0 to none; return how many there are.

        `only_session` spares those that have left the session of its first process: daemons. Nobody else's process is
        signalled, and never the one that asks. Raises UnsupportedError if it may not be.
        """

    def read_exit(self, container_id: str, identity: ProcessIdentity, pidfd: int) -> Exit | None:
        """Return how a process ended that has ended; None if that is to be asked again, a moment later.

        Asking again gives the same answer, until `forget_exits`. `pidfd` may be -1.
        """

    def forget_exits(self, container_ids: Sequence[str]) -> None:
        """Take note that the ends of these containers are written down: processes may be reaped."""

    def release(self, container_id: str) -> None:
        """End what is left of the container, and free what the starter keeps for it. May be repeated."""

    def end_leftovers(self, has_ended: Callable[[str], bool]) -> None:
        """End what is left of containers that have ended; `has_ended` is asked by id."""

    def probe(self, containers_dir: str) -> Probe:
        """Return what looks at this starter's containers, for one recovery pass."""
