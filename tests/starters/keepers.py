"""The keeper's processes, for tests: found by what they are, killed and held."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from limpet import Engine
from limpet.recovery.host import read_stat
from tests.conftest import EngineProcess, wait_until
from tests.starters.host import make

Start = Callable[[str], EngineProcess]


def find_keepers(state_dir: str) -> dict[str, int]:
    """Return the pids of the keeper's processes by their names, found without asking it."""
    directory = os.path.join(os.path.realpath(state_dir), "keeper")
    found: dict[tuple[str, int], int] = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            if comm.startswith("limpet-") and os.readlink(f"/proc/{pid}/fd/3") == directory:
                found[comm, pid] = int(read_stat(pid)[1])
    # What it forks is the same as itself for a moment.
    return {comm: pid for (comm, pid), parent in found.items() if (comm, parent) not in found}


def kill(state_dir: str, *names: str) -> None:
    """SIGKILL processes of the keeper, the anchor first: it has no time to take over, whatever their numbers are."""
    for name, pid in sorted(find_keepers(state_dir).items()):
        if name in names:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


KEEPER, ALL = ("limpet-keeper",), ("limpet-anchor", "limpet-keeper", "limpet-copier")


def wait_for_another_copier(state_dir: str, before: int) -> None:
    wait_until(lambda: find_keepers(state_dir).get("limpet-copier", before) != before, "the next copier")


@contextmanager
def held(pid: int) -> Iterator[None]:
    """Hold a process as a debugger does: no signal has it go on."""
    seize, interrupt, detach = 0x4206, 0x4207, 17  # PTRACE_SEIZE and so on
    ptrace = ctypes.CDLL(None).ptrace
    ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if ptrace(seize, pid, None, None):
        pytest.skip("no process can be traced here")
    ptrace(interrupt, pid, None, None)
    os.waitpid(pid, 0)
    try:
        yield
    finally:
        ptrace(detach, pid, None, None)


def leave_one(state_dir: str) -> Path:
    """Start the container "one", which ends with 3 once the file is there that is returned; no engine is left."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        container = make(engine, "one", "sh", "-c", "while [ ! -e end ]; do sleep 0.01; done; exit 3")
        container.start()
        return Path(container.metadata.root_dir, "working", "end")
