"""The command line: how much CPU time a command takes, including its children and the start of Python."""

import os
import subprocess
import sys

from limpet.benchmarks.figures import Cell, Figures
from limpet.benchmarks.population import limpet_path
from limpet.schema.errors import StoreError

_LIMPET = (sys.executable, "-m", "limpet")
COMMANDS: dict[str, tuple[str, ...]] = {
    "help": (*_LIMPET, "--help"),
    "ps": (*_LIMPET, "ps"),
    "ps-all": (*_LIMPET, "ps", "--all"),
    "python": (sys.executable, "-c", "pass"),
}


def measure_command(cell: Cell) -> Figures:
    """Run one command on a population."""
    environment = {**os.environ, "LIMPET_STATE_DIR": limpet_path(cell.stage, cell.size)}
    process = subprocess.Popen(
        COMMANDS[cell.contender], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    with process.stderr:
        said = process.stderr.read().decode(errors="replace")
    _, wait_status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(wait_status)
    if process.returncode:
        raise StoreError(f"{' '.join(COMMANDS[cell.contender][1:])}: exit status {process.returncode}: {said}")
    return {"cpu_ms": (usage.ru_utime + usage.ru_stime) * 1e3}
