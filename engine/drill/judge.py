"""The comparison of an engine's statements with the truth: pure, a table of questions about each container.

Time passes while the engine is asked, so the world is observed before and after. What had ended before cannot be
RUNNING; what is alive afterwards cannot have ended: processes do not come back.
"""

import os
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

from limpet.engine.drill.messages import Told
from limpet.engine.drill.script import Program
from limpet.engine.drill.truth import Group, Known, Truth, number_of
from limpet.engine.drill.world import World
from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import EXIT_CODE_UNKNOWN, ContainerState, Reason, Status

_NOT_OBSERVED = frozenset({Reason.UNKNOWN, Reason.REBOOTED})
GATE = "limpet-gate"
"""The name of a process that is to become a container's."""
_MAY_RUN = frozenset({ContainerState.RUNNING, ContainerState.UNKNOWN})


class Kind(StrEnum):
    """The kinds of fault; each fails the drill."""

    LOST = "lost"
    TORN = "torn"
    FALSE_RUNNING = "false_running"
    FALSE_EXITED = "false_exited"
    WRONG_EXIT_CODE = "wrong_exit_code"
    LEAKED = "leaked"
    HARMED = "harmed"
    """A process or file that is not the engine's, or an intact bundle, was changed."""
    BROKEN = "broken"
    """The engine ended by itself, hung, or raised an unexpected error."""


class Discrepancy(NamedTuple):
    """One fault."""

    container: str
    kind: Kind
    expected: str
    said: str


class Case(NamedTuple):
    """One container: what is known, what the engine reported (None for nothing), and the world before and after."""

    key: str
    known: Known | None
    said: Status | None
    bundle: str
    before: World
    after: World

    @property
    def pid(self) -> int:
        """The reported pid of its first process; 0 for none."""
        return self.identity.pid if self.identity else 0

    @property
    def code(self) -> int | None:
        """The exit code of that process, if the drill knows it."""
        one = self.identity
        return self.after.codes.get((one.pid, one.start_ticks, one.pidfd_inode)) if one else None

    @property
    def identity(self) -> ProcessIdentity | None:
        """The reported first process."""
        return self.said.identity if self.said else None


Expected = str
"""The correct answer, "" if nothing is wrong."""


def _lost(case: Case) -> Expected:
    known, said = case.known, case.said
    if known is None:
        return ""
    if known.deleted:
        return "deleted" if said is not None else ""
    floor = known.floor
    if floor is None:
        return ""
    if said is None:
        return "" if known.may_be_deleted else describe(floor)
    if said.reason == Reason.DAMAGED:
        return describe(floor)
    kept = (
        (floor.created_at, said.created_at),
        (floor.started_at, said.started_at),
        (floor.finished_at, said.finished_at),
        (floor.identity, said.identity),
        (floor.released, said.released),
    )
    return describe(floor) if any(was and was != now for was, now in kept) else ""


def _false_running(case: Case) -> Expected:
    said = case.said
    if said is None or said.state is not ContainerState.RUNNING:
        return ""
    if case.before.leads(case.identity, case.bundle):
        return ""
    code = case.code
    return f"not RUNNING: process {case.pid} has ended" + ("" if code is None else f" with code {code}")


def _false_exited(case: Case) -> Expected:
    said = case.said
    if said is None or not said.finished_at or not case.after.leads(case.identity, case.bundle):
        return ""
    return f"RUNNING: process {case.pid} is alive"


def _wrong_exit_code(case: Case) -> Expected:
    known, said = case.known, case.said
    if known is None or said is None or not said.finished_at:
        return ""
    floor = known.floor
    if floor is not None and floor.finished_at and floor.exit_code != said.exit_code:
        return f"code {floor.exit_code}, as was acknowledged"
    if said.exit_code == EXIT_CODE_UNKNOWN and said.reason in _NOT_OBSERVED:
        return "" if known.unwitnessed or not is_unseen(said) else "its code: there always was a keeper, which saw it"
    if said.reason == Reason.START_ERROR and known.program.starts:
        return "" if known.starting else "a code: its start had returned"
    code = case.code
    if code is not None and known.program.starts:  # of a program that cannot be executed, its gate was reaped
        return "" if said.exit_code == code else f"code {code}, which the drill reaped"
    # Reaped by its engine: the codes that the program can end with.
    possible = possible_codes(known.program, signalled=known.signalled)
    expected = f"code {' or '.join(map(str, sorted(possible)))}" if possible else "none: it does not end by itself"
    return "" if said.exit_code in possible else expected


def _harmed(case: Case) -> Expected:
    known, said = case.known, case.said
    if known is None or said is None or said.reason != Reason.BUNDLE_LOST or known.disturbed:
        return ""
    return "its bundle unchanged: the drill did not touch it"


CHECKS: tuple[tuple[Kind, Callable[[Case], Expected]], ...] = (
    (Kind.LOST, _lost),
    (Kind.FALSE_RUNNING, _false_running),
    (Kind.FALSE_EXITED, _false_exited),
    (Kind.WRONG_EXIT_CODE, _wrong_exit_code),
    (Kind.HARMED, _harmed),
)
"""The questions about each container, in this order."""


def judge(truth: Truth, told: Told, containers_dir: str, before: World, after: World) -> list[Discrepancy]:
    """Return the engine's false statements; see `find_leaks` for what it did not report."""
    found = []
    for key in sorted(truth.known.keys() | told.containers.keys()):
        case = Case(
            key, truth.known.get(key), told.containers.get(key), os.path.join(containers_dir, key), before, after
        )
        for kind, check in CHECKS:
            expected = check(case)
            if expected:
                found.append(Discrepancy(key, kind, expected, describe(case.said)))
    for name, group in truth.groups.items():
        found += _judge_group(name, group, told)
    for name in sorted(truth.sandboxes.difference(told.sandboxes)):
        found.append(Discrepancy(name, Kind.LOST, "the sandbox", "nothing"))
    return found


def find_leaks(told: Told, containers_dir: str, after: World) -> list[Discrepancy]:
    """Return the processes of containers that are neither RUNNING nor UNKNOWN, or never had a process by their record.

    A process that is just ending is included: look again before reporting it.
    """
    leaders = {
        status.identity.pid: key
        for key, status in told.containers.items()
        if status.identity and not after.is_reused(status.identity)
    }
    found = []
    for process in after.processes.values():
        if process.pid in after.strangers:
            continue
        directory, key = os.path.split(process.bundle)
        if directory != containers_dir:
            key = leaders.get(process.group, "")
        said = told.containers.get(key)
        if said is not None and said.finished_at and said.identity and said.identity.pid == process.pid:
            continue  # reported as ended, which is false: `judge` reports that
        if process.command == GATE and not key:
            found.append(Discrepancy("-", Kind.LEAKED, f"no process; gate {process.pid} is alive", "nothing"))
        if key and (said is None or said.state not in _MAY_RUN or said.identity is None):
            expected = f"no process; {process.pid} is alive"
            found.append(Discrepancy(key, Kind.LEAKED, expected, describe(said)))
    return found


def is_unseen(said: Status) -> bool:
    """Return whether it is said that it ran and has ended, and that nobody saw how.

    Of one that had no process, and was released while in doubt, there is nothing to see.
    """
    is_ended = said.identity is not None and bool(said.finished_at)
    return is_ended and said.exit_code == EXIT_CODE_UNKNOWN and said.reason in _NOT_OBSERVED


def possible_codes(program: Program, *, signalled: bool) -> frozenset[int]:
    """Return the exit codes that a program can end with."""
    return program.codes | program.stop_codes if signalled and program.starts else program.codes


def describe(status: Status | None) -> str:
    """Return a short description of a status."""
    if status is None:
        return "nothing"
    words: Iterator[str] = iter(
        (
            status.state.name,
            f"pid {status.pid}" if status.pid else "",
            f"code {status.exit_code}" if status.finished_at else "",
            status.reason,
            "released" if status.released else "",
            repr(status.message) if status.message else "",
        )
    )
    return ", ".join(filter(None, words))


def _judge_group(name: str, group: Group, told: Told) -> list[Discrepancy]:
    statuses = [told.containers.get(member) for member in group.members]
    if any(status is not None and status.unknown for status in statuses):
        return []  # the reason for the doubt replaces the number
    numbers = [None if status is None else number_of(status) for status in statuses]
    said = "; ".join(map(describe, statuses))
    if len(set(numbers)) > 1:
        return [Discrepancy(name, Kind.TORN, f"the same for {' and '.join(group.members)}", said)]
    if numbers[0] is None:
        return []  # its members are judged individually
    allowed = {group.acknowledged, group.acknowledged if group.under_way is None else group.under_way}
    if numbers[0] not in allowed:
        return [Discrepancy(name, Kind.LOST, f"transaction {group.acknowledged}", said)]
    return []
