"""Lives and engines with one promise broken: a drill that does not catch its control proves nothing.

Each life breaks the store in its own process, which ends with it; the check is the real one.
"""

from collections.abc import Callable

from limpet.engine.database.sqlite import connection as sqlite
from limpet.engine.drill.store_life import FailingDiskLife, Step, StoreLife, World
from limpet.engine.engine import Engine
from limpet.engine.starters.process import starter as process
from limpet.recovery import host, probe
from limpet.recovery.evidence import Boot, Process
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

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Live with another setting; reading it back gives the expected value."""
        without = {"synchronous": ("synchronous", "off", 0)}
        sqlite.WRITER_PRAGMAS = tuple(without.get(pragma[0], pragma) for pragma in sqlite.WRITER_PRAGMAS)
        super().live(directory, acknowledge)


class DeafLife(FailingDiskLife):
    """Acknowledges a step even if the store reported that it failed."""

    def perform(self, step: Step, world: World) -> None:
        """Do a step, and ignore errors."""
        try:
            super().perform(step, world)
        except (LimpetError, OSError):
            return


def open_trusting_pids(state_dir: str) -> Engine:
    """Open an engine that takes any process with a container's pid for the container's."""

    def compare(identity: ProcessIdentity, pidfd: int, bundle_path: str) -> tuple[Process, str]:  # noqa: ARG001
        return Process.ALIVE, ""

    for module in (host, process):
        setattr(module, "compare", compare)  # noqa: B010
    return Engine.open(state_dir)


def open_blind_to_boots(state_dir: str) -> Engine:
    """Open an engine that also ignores in which boot a process was started."""
    setattr(probe, "observe_boot", lambda _: Boot.SAME)  # noqa: B010
    return open_trusting_pids(state_dir)
