"""A system that refuses: each system call of a life is made to fail once, and what that leaves is checked.

Also calls that change no file: processes and threads that cannot be made, descriptors and memory that run out, messages
that are not sent. A fault is named call:ROLE/NAME:N:ERROR: the N-th call NAME (from 0) of the processes of a role gets
this errno; with KILL its process is killed there, with STOP it is stopped by a signal, until somebody has it continue.
A close is done and then reported as failed.

The life goes on: it may raise what its caller is to see, retry or do without. While the check runs, processes that the
life has left behind live on, and nothing fails any more. Where threads or processes race, a life may have fewer calls
than the one before: it is lived again, and what is not reached then either is counted apart.
"""

import errno
import os
import random
import signal
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, Self, get_args

from limpet.schema.errors import InvalidInputError
from limpet.testing.calls import ANY_CALL, CALL_FAILURES, KILLED, STOPPED
from limpet.testing.life import LifeFailedError, Live
from limpet.testing.pool import Mark
from limpet.testing.process import Process, read_failure, start
from limpet.testing.roles import LIFE, Roles
from limpet.testing.run import run_jobs
from limpet.testing.supervisor import Event, HungError, Supervisor
from limpet.testing.syscalls import Stops
from limpet.testing.tree import copy, empty, scratch
from limpet.testing.workload import (
    Finding,
    Kind,
    NothingToTestError,
    Progress,
    Report,
    Violation,
    Workload,
    require_positive,
)

_LENGTH: Final = struct.Struct("=I")
_CLOSED: Final = "limpet-testing-closed"
_NAME_OF_CLOSED: Final = f"/memfd:{_CLOSED}"
_LONGEST_REPORT: Final = 16_384
_TRIES: Final = 3
_KINDS: Final[Mapping[str, Kind]] = {kind: kind for kind in get_args(Kind)}


class CallFault(NamedTuple):
    """The name of a fault."""

    role: str
    call: str
    number: int
    error: str

    def __str__(self) -> str:
        return f"call:{self.role}/{self.call}:{self.number}:{self.error}"

    @classmethod
    def parse(cls, text: str) -> "CallFault":
        """Return the fault named by `text`. Raises InvalidInputError."""
        try:
            _, place, number, error = text.split(":")
            role, _, call = place.rpartition("/")
            fault = cls(role, call, int(number), error)
        except ValueError:
            raise InvalidInputError(f"{text!r}: expected call:ROLE/NAME:N:ERROR") from None
        if call not in CALL_FAILURES or not (error in {KILLED, STOPPED} or hasattr(errno, error)) or fault.number < 0:
            raise InvalidInputError(f"{text!r}: unknown call or error")
        return fault


def open_descriptors(process: int | str = "self") -> dict[int, str]:
    """Return what a process has open, by its number: for a life that looks for leaks.

    A descriptor whose close was reported as failed is left out: it is closed, only its number is still taken.
    """
    found: dict[int, str] = {}
    for _ in range(2):  # what fails may be one of these calls
        with suppress(OSError):
            for name in os.listdir(f"/proc/{process}/fd"):
                with suppress(OSError):
                    found[int(name)] = os.readlink(f"/proc/{process}/fd/{name}")
    return {number: target for number, target in found.items() if not target.startswith(_NAME_OF_CLOSED)}


def call_faults(
    workload: Workload,
    *,
    roles: Mapping[str, str] | None = None,
    failures: Mapping[str, Sequence[str]] = CALL_FAILURES,
    most: int | None = None,
    seed: int = 0,
    every: int = 1,
    workers: int = 1,
    deadline_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Report:
    """Let each system call of a life (or every k-th) fail with each error, and check what every such life leaves.

    Processes have the roles that `roles` gives them by their names, and calls of others do not fail; by default each
    name is a role. `failures` are the errors tried for each call, "KILL" and "STOP" among them; those of "ROLE/NAME" go
    before those of NAME. Of the calls of one name and role at most `most` are tried, from all over the life.

    A life that does not end by itself in time, or by an exception, is a finding. Raises LifeFailedError, HungError (the
    life without a fault), UnsupportedError, NothingToTestError, and InvalidInputError if `failures` are invalid.
    """
    require_positive(every=every, workers=workers, most=1 if most is None else most)
    for name, errors in failures.items():
        role, _, call = name.rpartition("/")
        for error in errors or (KILLED,):
            CallFault.parse(str(CallFault(role, call, 0, error)))
    trial = CallTrial(workload, roles, deadline_seconds)
    with scratch() as directory:
        tried = ANY_CALL.of(*{name.rpartition("/")[2] for name, errors in failures.items() if errors})
        lives = [Counter(trial.count(f"{directory}/0", tried)) for _ in range(2)]  # what is in both is in most
        faults = _choose(lives[0] & lives[1], failures, most, random.Random(seed))[seed % every :: every]  # noqa: S311 - repeatable by its seed
        return run_jobs(
            lambda index: lambda fault, mark: trial.check(fault, f"{directory}/{index}", mark),
            faults,
            counted=Report(faults=1),
            workers=workers,
            deadline_seconds=3 * deadline_seconds,
            progress=progress,
        )


def _choose(
    counts: Mapping[tuple[str, str], int], failures: Mapping[str, Sequence[str]], most: int | None, rng: random.Random
) -> list[CallFault]:
    """Return the faults of a life with so many calls, those of a role and call beside each other."""
    faults = []
    for (role, call), count in sorted(counts.items()):
        numbers = range(count) if most is None or count <= most else sorted(rng.sample(range(count), most))
        errors = failures.get(f"{role}/{call}", failures.get(call, ()))
        faults += [CallFault(role, call, number, error) for number in numbers for error in errors]
    if not faults:
        raise NothingToTestError("the workload's life has no system calls that could fail")
    return faults


class _Injector:
    """Answers the calls of one life according to a fault; counts them all."""

    def __init__(self, supervisor: Supervisor, roles: Roles, fault: CallFault | None, spared: int) -> None:
        self._supervisor, self._roles, self._fault, self._spared = supervisor, roles, fault, spared
        self.counts: Counter[tuple[str, str]] = Counter()
        self.has_struck = False

    def answer(self, event: Event) -> None:
        """Let the call go or fail, whichever is its turn."""
        try:
            role = self._roles.of(event.pid)
        except OSError:  # it was killed meanwhile
            role = None
        is_ours = role == LIFE and event.name == "write" and event.arguments[0] == self._spared
        if role is None or is_ours or (event.name == "brk" and not event.arguments[0]):
            self._supervisor.let_go(event)
            return
        number = self.counts[role, event.name]
        self.counts[role, event.name] += 1
        if self._fault is not None and self._fault[:3] == (role, event.name, number):
            self.has_struck = True
            self._strike(event, self._fault.error)
        else:
            self._supervisor.let_go(event)

    def _strike(self, event: Event, error: str) -> None:
        if error == KILLED:
            with suppress(ProcessLookupError):  # stopped, so its number is its own
                os.kill(self._roles.process(event.pid), signal.SIGKILL)
        elif error == STOPPED:
            os.kill(self._roles.process(event.pid), signal.SIGSTOP)
            self._supervisor.let_go(event)
        elif event.name == "brk":
            self._supervisor.answer(event, 0)  # not an errno: the end of its memory is not where it was asked for
        else:
            if event.name == "close":
                self._close(event)
            self._supervisor.fail(event, getattr(errno, error))

    def _close(self, event: Event) -> None:
        """Close the process's descriptor: something empty takes its number."""
        if not os.path.exists(f"/proc/{event.pid}/fd/{event.arguments[0]}"):
            return
        empty_file = os.memfd_create(_CLOSED, os.MFD_CLOEXEC)
        try:
            self._supervisor.replace_descriptor(event, event.arguments[0], empty_file)
        finally:
            os.close(empty_file)


class _Lived(NamedTuple):
    acknowledged: list[bytes]
    failure: str
    """Why it ended, if not by itself."""


@dataclass(frozen=True)
class CallTrial:
    """Lives of a workload, each with one call that fails."""

    workload: Workload
    roles: Mapping[str, str] | None
    deadline_seconds: float

    def count(self, place: str, stops: Stops = ANY_CALL) -> Mapping[tuple[str, str], int]:
        """Live without a fault, check it, and return how many of these calls there were, by role and name."""
        with _Trial(self, None, place, stops) as trial:
            lived = trial.live()
            if lived.failure:
                raise LifeFailedError(f"the workload {lived.failure}")
            for finding in trial.check(lived.acknowledged):
                raise LifeFailedError(f"{finding.point}: {finding.message}")
            return trial.counts

    def check(self, fault: CallFault, place: str, mark: Mark, *, keep: str = "") -> Iterator[Report]:
        """Live with this fault, and check what it leaves; a copy of which goes to the new directory `keep`.

        How many calls a life makes is a matter of timing, too: one that does not reach the fault is lived again.
        """
        for _ in range(_TRIES):
            mark(str(fault))
            findings: list[Finding] = []
            with _Trial(self, fault, place, ANY_CALL.of(fault.call)) as trial:
                lived = trial.live()
                if lived.failure and not (fault.error == KILLED and fault.role == LIFE):
                    findings.append(Finding(str(fault), "other", f"the workload {lived.failure}"))
                mark(str(fault))
                is_tried = trial.has_struck or bool(findings)
                if keep and is_tried:
                    copy(place, keep)
                if trial.has_struck and not trial.is_killed:
                    findings += trial.check(lived.acknowledged)
            if is_tried:
                yield Report.of(findings, faults=1, acknowledged=len(lived.acknowledged))
                return
        yield Report(unreached=1)


class _Trial:
    """One life with all that it has started; a context manager that ends it."""

    def __init__(self, plan: CallTrial, fault: CallFault | None, place: str, stops: Stops) -> None:
        empty(place)
        self._plan, self._place, self._name = plan, place, str(fault) if fault else "the life without a fault"
        self._said = os.memfd_create("limpet-testing-acknowledged", os.MFD_CLOEXEC)
        try:
            self._supervisor = Supervisor(
                partial(_live, plan.workload.live, os.path.realpath(place), self._said),
                deadline_seconds=plan.deadline_seconds,
                stops=stops,
            )
        except BaseException:
            os.close(self._said)
            raise
        self._roles = Roles(self._supervisor.pid, plan.roles)
        self._injector = _Injector(self._supervisor, self._roles, fault, self._said)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._supervisor.close()
        self._roles.close()
        os.close(self._said)

    @property
    def has_struck(self) -> bool:
        return self._injector.has_struck

    @property
    def is_killed(self) -> bool:
        """Whether it hung and was killed; what it left is not looked at, then."""
        return self._supervisor.killed

    @property
    def counts(self) -> Mapping[tuple[str, str], int]:
        return self._injector.counts

    def live(self) -> _Lived:
        failure = ""
        try:
            for event in self._supervisor.events():
                self._injector.answer(event)
        except HungError as error:
            failure = f"hangs: {error}"
        if not failure and self._supervisor.status:
            failure = f"ended with status {self._supervisor.status}: {self._supervisor.failure() or 'no traceback'}"
        return _Lived(list(_read_acknowledged(self._said)), failure)

    def check(self, acknowledged: Sequence[bytes]) -> list[Finding]:
        """Check in a process of its own, while what the life has left behind goes on."""
        with start(partial(_check, self._plan.workload, self._place, acknowledged)) as checking:
            return [Finding(self._name, kind, message) for kind, message in self._watch(checking)]

    def _watch(self, checking: Process) -> Iterator[tuple[Kind, str]]:
        try:
            for event in self._supervisor.events_beside(checking, self._plan.deadline_seconds):
                self._supervisor.let_go(event)
        except HungError as error:
            yield "other", f"the check hangs: {error}"
            return
        said = read_failure(checking)
        kind, _, message = said.partition(":")
        if kind in _KINDS:
            yield _KINDS[kind], message
        elif checking.status or said:
            yield "other", f"the check ended with status {checking.status}: {said}"


def _live(live: Live, place: str, said: int) -> None:
    def acknowledge(data: bytes) -> None:
        os.write(said, _LENGTH.pack(len(data)) + data)

    live(place, acknowledge)


def _read_acknowledged(said: int) -> Iterator[bytes]:
    data = os.pread(said, os.fstat(said).st_size, 0)
    while data:
        end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
        yield data[_LENGTH.size : end]
        data = data[end:]


def _check(workload: Workload, place: str, acknowledged: Sequence[bytes], report: socket.socket) -> None:
    try:
        workload.check(place, acknowledged)
    except Violation as violation:
        report.send(f"{violation.kind}:{violation}".encode(errors="replace")[:_LONGEST_REPORT])
