"""What an engine asks of a starter: how a container's process comes to be, is seen, signalled and cleaned up after.

prepare, checkpoint, go: the process is made but held, its identity is written to disk, and only then it may run. A
kill between any two of these leaves no process that the store does not know.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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
    """Readable once the process has ended. `Starter.abort` closes it; after `go`, the watcher does."""
    resources: Resources | None
    """Which limits are in force; None if none were asked for."""
    own: object = None
    """What the starter needs to let it go; nobody else looks at it."""


class Starter(Protocol):
    """Starts, finds again, signals and cleans up after the containers of an engine. Thread-safe."""

    @property
    def name(self) -> str:
        """Its name, which each container's metadata keeps."""

    def make_config(self, launch: Launch) -> bytes:
        """Return the content of the bundle's config.json: what is to be run, in this starter's words.

        Raises InvalidInputError for a config that it cannot carry out.
        """

    def prepare(self, launch: Launch) -> Prepared:
        """Make the process and hold it. Raises StartError, StateDirectoryError for a damaged bundle."""

    def go(self, prepared: Prepared) -> None:
        """Let it run; returns once the program runs. Raises StartError if it cannot be executed."""

    def abort(self, prepared: Prepared) -> None:
        """End a process that is still held, and wait until it is gone."""

    def adopt(self, identity: ProcessIdentity, bundle_path: str) -> int:
        """Return a pidfd of the very process, running or just ended. Raises NotFoundError if it is not there."""

    def signal(self, pidfd: int, number: int) -> None:
        """Send a signal to the process and its group; nothing happens if all of it has ended."""

    def read_exit(self, pid: int, pidfd: int) -> int | None:
        """Return the exit code of a process that has ended, 128 + signal if one ended it; None if it is not known.

        Asking again gives the same answer, until `forget_exit`.
        """

    def forget_exit(self, pidfd: int) -> None:
        """Reap the process: its end is written down."""

    def release(self, container_id: str, bundle_path: str) -> None:
        """End what is left of the container, and free what the starter keeps for it. May be repeated."""

    def end_leftovers(self, containers_dir: str, has_ended: Callable[[str], bool]) -> None:
        """End what is left of containers that have ended; `has_ended` is asked by id."""

    def probe(self, containers_dir: str) -> Probe:
        """Return what looks at this starter's containers, for one recovery pass."""
