"""Lives and engines with one promise broken: a drill that does not catch its control proves nothing.

Each life breaks the store in its own process, which ends with it; the check is the real one.
"""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

from limpet.engine.drill.opening import replace_pragmas
from limpet.engine.drill.store_life import FailingDiskLife, Step, StoreLife, World
from limpet.engine.engine import Engine
from limpet.engine.starters import Prepared
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


HASTY_KEEPER = """
import os, time
from keeper import ends, keeper

class Hasty(ends.Ends):
    pause = 0.0
    def _peek(self, container):
        end = super()._peek(container)
        if end is not None and "code" in end:
            try:
                os.waitid(os.P_PIDFD, container.pidfd, os.WEXITED)
            except ChildProcessError:
                pass
            time.sleep(self.pause)
        return end

keeper.Ends = Hasty
"""
"""What has a keeper reap a process before it has written down how that ended."""
_HASTY_PROGRAM = f"""
import sys
sys.path.insert(0, sys.argv[1])
from keeper import main
{HASTY_KEEPER}
Hasty.pause = 0.3  # as on a slow disk
main.main()
"""
_TRUSTING_KEEPER = """
import sys
sys.path.insert(0, sys.argv[1])
from keeper import adoption, main, starts

class Any(int):
    __hash__ = int.__hash__
    def __eq__(self, other): return True
    def __ne__(self, other): return False

adoption.read_inode = starts.read_inode = lambda pidfd, anonymous: Any(1)
main.main()
"""


def _begin_keepers_by(program: str) -> None:
    """Have this process, which the drill kills, begin keepers by another program."""
    client = import_module("limpet.engine.starters.process.client")
    setattr(client, "_PROGRAM", program)  # noqa: B010


def open_with_a_hasty_keeper(state_dir: str) -> Engine:
    """Open an engine whose keeper reaps a process before it has written down how that ended."""
    _begin_keepers_by(_HASTY_PROGRAM)
    return Engine.open(state_dir)


class _CredulousStarter(ProcessStarter):
    """Takes a dead gate for a start."""

    def go(self, prepared: Prepared) -> None:
        """Open the gate, whatever becomes of it."""
        held = prepared.own
        with suppress(LimpetError):
            held.connection.ask({"op": "go", "id": held.container_id})  # type: ignore[attr-defined]
        held.give_up()  # type: ignore[attr-defined]


def open_taking_gates_for_starts(state_dir: str) -> Engine:
    """Open an engine that does not ask whether a container's program was executed."""
    return Engine.open(state_dir, starter=_CredulousStarter())


class _BlindStarter(ProcessStarter):
    """Its probe does not ask for the boot."""

    def probe(self, containers_dir: str) -> HostProbe:
        return HostProbe(containers_dir, compare=trust, observe_boot=lambda _: Boot.SAME)


def open_trusting_pids(state_dir: str) -> Engine:
    """Open an engine, with such a keeper, that takes whoever has a container's pid for its process."""
    _begin_keepers_by(_TRUSTING_KEEPER)
    return Engine.open(state_dir, starter=ProcessStarter(compare=trust))


def open_blind_to_boots(state_dir: str) -> Engine:
    """Open an engine that does not ask in which boot a process was started, either."""
    return Engine.open(state_dir, starter=_BlindStarter(compare=trust))
