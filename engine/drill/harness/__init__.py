"""Crash tests for any store that keeps files in a directory: your workload, our kill points and power cuts.

A workload lives in a directory and acknowledges what has become durable; its check recovers what a crash left and
compares. One short life, stopped at each system call that changes a file, yields every point at which it can be killed,
every disk state that a power cut can leave, and every operation that a failing disk can refuse. `call_faults` refuses
every system call, also those that change no file:

    class Ledger:
        def live(self, directory, acknowledge):
            for number in range(10):
                path = f"{directory}/{number}"
                with open(path, "x") as file:
                    file.write("paid")
                    file.flush()
                    os.fsync(file.fileno())
                acknowledge(b"%d" % number)        # too early: the new name is not durable yet

        def check(self, directory, acknowledged):
            for number in acknowledged:
                path = f"{directory}/{number.decode()}"
                if not os.path.exists(path):
                    raise Violation("lost", f"payment {number.decode()} is gone")

    if (reason := supported()) is not None:
        sys.exit(f"not tested: {reason}")
    report = kill_points(Ledger()) + power_cuts(Ledger(), workers=2)
    print(report.points, report.images, report.lost)
    for finding in report.findings:                # replay(Ledger(), finding.point, "/tmp/look") repeats it
        print(finding.point, finding.kind, finding.message)

It needs Linux 5.19 or newer on x86_64 or aarch64, and a process with one thread; it needs neither root nor a compiler.
The life may have threads and child processes. Changes outside the model (shared writable mappings, io_uring, sendfile
into the store...) end the test with BlindSpotError, so that nothing is missed silently; SQLite's -shm is treated as
volatile. None of that knows limpet's own store.

`FakeStarter` is for tests of programs that use `Engine`: its containers have no processes and do what the test says.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from limpet.testing.calls import CALL_FAILURES
from limpet.testing.disk import Fate, Model
from limpet.testing.emulation import BlindSpotError
from limpet.testing.faults import FAILURES, fault_points
from limpet.testing.kills import kill_points, true_kills
from limpet.testing.life import Life, LifeFailedError, NotReachedError, Step, record, supported
from limpet.testing.operations import Trace
from limpet.testing.powercut import Images, Point, power_cuts
from limpet.testing.recovery import recovery_cuts
from limpet.testing.refusals import call_faults, open_descriptors
from limpet.testing.replay import replay
from limpet.testing.supervisor import HungError
from limpet.testing.tree import materialise
from limpet.testing.workload import (
    Finding,
    Kind,
    NothingToTestError,
    Report,
    Violation,
    Workload,
)

if TYPE_CHECKING:
    from limpet.testing.fake_starter import FakeStarter

__all__ = [
    "CALL_FAILURES",
    "FAILURES",
    "BlindSpotError",
    "FakeStarter",
    "Fate",
    "Finding",
    "HungError",
    "Images",
    "Kind",
    "Life",
    "LifeFailedError",
    "Model",
    "NotReachedError",
    "NothingToTestError",
    "Point",
    "Report",
    "Step",
    "Trace",
    "Violation",
    "Workload",
    "call_faults",
    "fault_points",
    "kill_points",
    "materialise",
    "open_descriptors",
    "power_cuts",
    "record",
    "recovery_cuts",
    "replay",
    "supported",
    "true_kills",
]


def __getattr__(name: str) -> Any:
    if name != "FakeStarter":  # loaded apart: all the rest needs nothing of limpet
        raise AttributeError(f"module 'limpet.testing' has no attribute {name!r}")
    return import_module("limpet.testing.fake_starter").FakeStarter
