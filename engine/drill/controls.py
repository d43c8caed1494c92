"""Lives and engines with one promise broken: a drill that does not catch its control proves nothing.

Each life breaks the store in its own process, which ends with it; the check is the real one.
"""

from collections.abc import Callable

from limpet.engine.drill.opening import replace_pragmas
from limpet.engine.drill.store_life import FailingDiskLife, Step, StoreLife, World
from limpet.engine.engine import Engine
from limpet.engine.starters.process import ProcessStarter
from limpet.recovery.evidence import Boot, Process
from limpet.recovery.probe import HostProbe
from limpet.schema.errors import LimpetError
from limpet.schema.identity import ProcessIdentity


class HastyLife(StoreLife):
    """Acknowledges each step before it is done."""

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Acknowledge a step, then do it."""
        acknowledge(b"0")
        super().live(directory, lambda number: acknowledge(b"%d" % (int(number) + 1)))


class UnflushedLife(StoreLife):
    """Its commits are not flushed (synchronous=OFF)."""

    pragmas = replace_pragmas(synchronous=("off", 0))


class DeafLife(FailingDiskLife):
    """Acknowledges a step even if the store reported that it failed."""

    def perform(self, step: Step, world: World) -> None:
        """Do a step, and ignore errors."""
        try:
            super().perform(step, world)
        except (LimpetError, OSError):
            return


def trust(identity: ProcessIdentity, pidfd: int) -> tuple[Process, str]:  # noqa: ARG001
    """Take whoever has the pid for the container's process."""
    return Process.ALIVE, ""


class _BlindStarter(ProcessStarter):
    """Its probe does not ask for the boot."""

    def probe(self, containers_dir: str) -> HostProbe:
        return HostProbe(containers_dir, compare=trust, observe_boot=lambda _: Boot.SAME)


def open_trusting_pids(state_dir: str) -> Engine:
    """Open an engine that takes whoever has a container's pid for its process."""
    return Engine.open(state_dir, starter=ProcessStarter(compare=trust))


def open_blind_to_boots(state_dir: str) -> Engine:
    """Open an engine that does not ask in which boot a process was started, either."""
    return Engine.open(state_dir, starter=_BlindStarter(compare=trust))
