"""How a container's process comes to be. One small protocol; `process` starts it on this host.

prepare, checkpoint, go: the process is made but held, its identity is written to disk, and only then it may
run. A kill between any two of these leaves no process that the store does not know.
"""

from dataclasses import dataclass
from typing import Protocol

from limpet.engine.lifecycle.command_line import BundleConfig
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import Resources


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A process that exists and is held: it has not run a line of the user's program."""

    identity: ProcessIdentity
    pidfd: int
    """Ours to close; `Starter.abort` does, and so does whoever watches the process."""
    gate: int
    report: int
    resources: Resources | None


class Starter(Protocol):
    """Starts, finds again, signals and cleans up after a container's process."""

    def prepare(
        self,
        container_id: str,
        bundle_path: str,
        config: BundleConfig,
        log_path: str,
        requested: LinuxContainerResources | None,
    ) -> Prepared:
        """Make the process and hold it. Raises StartError."""
        ...

    def go(self, prepared: Prepared) -> None:
        """Let it run; returns once the program runs. Raises StartError if it cannot be executed."""
        ...

    def abort(self, prepared: Prepared) -> None:
        """End a process that is still held, and wait until it is gone."""
        ...

    def adopt(self, identity: ProcessIdentity, bundle_path: str) -> int:
        """Return a pidfd of the very process, running or just ended. Raises NotFoundError if it is not there."""
        ...

    def signal(self, pidfd: int, number: int) -> None:
        """Send a signal to the process and its group; nothing happens if all of it has ended."""
        ...

    def release(self, container_id: str, bundle_path: str) -> None:
        """End what is left of the container, and free what the starter keeps for it. May be repeated."""
        ...
