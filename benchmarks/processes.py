"""The processes of a run: one measures cells, one holds the population. `worker` is their code.

They run in separate sessions: an interrupt reaches only the run, which ends them and everything they started.
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import msgspec

from limpet.benchmarks.figures import Cell, Outcome
from limpet.benchmarks.population import READY, Population
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import StoreError

_outcome = make_decoder(Outcome)
_TIMEOUT_SECONDS = 300.0
_MODULE = "limpet.benchmarks.worker"


class CellRunner:
    """Measures cells one after the other, each in a separate process. Use it in a with statement."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, cell: Cell) -> Outcome:
        """Measure a cell. A failure or a timeout is an outcome too."""
        if self._process is None:
            self._process = _start("serve")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(cell) + b"\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], _TIMEOUT_SECONDS)[0]:
            self._end()
            return Outcome(failed=f"it took longer than {_TIMEOUT_SECONDS:g} s")
        line = self._process.stdout.readline()
        if not line:
            self._end()
            return Outcome(failed="the process that starts the cells has ended")
        return _outcome.decode(line)

    def _end(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None


@contextmanager
def populate(population: Population) -> Iterator[None]:
    """Make a population and keep it alive while the block runs. Raises StoreError."""
    process = _start("hold", msgspec.json.encode(population).decode())
    try:
        assert process.stdout is not None
        if process.stdout.readline() != READY:
            raise StoreError(f"the population was not created: its process ended with {process.wait()}")
        yield
    finally:
        _end(process)


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    command = (sys.executable, "-m", _MODULE, *arguments)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything it started."""
    with process:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
