"""What the user of crash tests provides, a Workload, and what they get: a Report of what was tried and found."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Final, Literal, Protocol, Self, get_args

from limpet.schema.errors import InvalidInputError, LimpetError, quote
from limpet.testing.process import FAILED, end_descendants

Kind = Literal["lost", "torn", "false_verdict", "other"]
"""How a promise was broken: acknowledged but gone, half done, a false statement, or otherwise."""

KEPT_FINDINGS: Final = 100
"""How many findings a report keeps in full; it counts all of them."""

Progress = Callable[[int, int], None]
"""Called between jobs with how many are done, and how many there are as far as known."""


class Violation(Exception):  # noqa: N818 - a finding about the workload, not an error of the test
    """Raised by a check: the directory does not contain what was promised.

    Raises InvalidInputError for an unknown kind, which a report could not count.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        if kind not in get_args(Kind):
            raise InvalidInputError(f"unknown kind of violation {quote(kind)}: use one of {', '.join(get_args(Kind))}")
        self.kind: Kind = kind


class Workload(Protocol):
    """A store under test: how it lives, and how to check that it kept its promises.

    Each life must do the same operations, or points cannot be repeated by name.
    """

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Live in `directory` (empty at first), and acknowledge what has become durable, each by one call.

        Runs in a separate process, which may use threads and start processes; acknowledge() may be called from any of
        them that were forked, not executed.
        """

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Recover in `directory`, which may be another path, and compare with all that was acknowledged.

        The operation in progress at the crash may have happened or not. Raises Violation; any other exception is a
        finding too, of the kind "other".
        """


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken promise, and the name of the point by which `replay` repeats it."""

    point: str
    kind: Kind
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was tried and what was found. Reports add up."""

    points: int = 0
    """Points in a life at which it was killed, or its state was copied as a kill leaves it."""
    images: int = 0
    """Distinct disk states that a power cut can leave, each recovered and checked."""
    faults: int = 0
    """Operations, or system calls, made to fail."""
    unreached: int = 0
    """Calls that were to fail, and that the life did not come to this time; see `call_faults`."""
    damaged: int = 0
    """Damaged states on disk: flipped bits, or files truncated, swapped or replaced."""
    cases: int = 0
    """States found after a restart, with real processes, on which recovery was judged."""
    acknowledged: int = 0
    """Acknowledgements that were compared, over all checks."""
    lost: int = 0
    torn: int = 0
    false_verdicts: int = 0
    other: int = 0
    findings: tuple[Finding, ...] = field(default=(), compare=False)
    """The first of them, at most KEPT_FINDINGS."""

    @classmethod
    def of(
        cls,
        findings: Iterable[Finding],
        *,
        points: int = 0,
        images: int = 0,
        faults: int = 0,
        damaged: int = 0,
        cases: int = 0,
        acknowledged: int = 0,
    ) -> Self:
        """Return the report of one piece of work."""
        found = tuple(findings)
        kinds = Counter(finding.kind for finding in found)
        return cls(
            points=points,
            images=images,
            faults=faults,
            damaged=damaged,
            cases=cases,
            acknowledged=acknowledged,
            lost=kinds["lost"],
            torn=kinds["torn"],
            false_verdicts=kinds["false_verdict"],
            other=kinds["other"],
            findings=found[:KEPT_FINDINGS],
        )

    def __add__(self, more: "Report") -> "Report":
        counts = [field.name for field in fields(self) if field.name != "findings"]
        sums = {name: getattr(self, name) + getattr(more, name) for name in counts}
        return Report(**sums, findings=(self.findings + more.findings)[:KEPT_FINDINGS])

    @property
    def violations(self) -> int:
        """The number of failed checks."""
        return self.lost + self.torn + self.false_verdicts + self.other

    @property
    def clean(self) -> bool:
        """Whether something was tried and every promise was kept."""
        tried = (self.points, self.images, self.faults, self.damaged, self.cases)
        return not self.violations and any(tried)


class Checker:
    """Checks directories one after another and collects the findings."""

    def __init__(self, workload: Workload) -> None:
        self._workload, self._process = workload, os.getpid()
        self._findings: list[Finding] = []
        self._acknowledged = 0

    @property
    def has_found(self) -> bool:
        """Whether there are findings that no report has yet."""
        return bool(self._findings)

    def report(self, *, points: int = 0, images: int = 0, faults: int = 0) -> Report:
        """Return the findings since the last report, as that of so many points, images and faults."""
        findings, acknowledged = self._findings, self._acknowledged
        self._findings, self._acknowledged = [], 0
        return Report.of(findings, points=points, images=images, faults=faults, acknowledged=acknowledged)

    def add(self, point: str, kind: Kind, message: str) -> None:
        """Add a finding that no check made."""
        self._findings.append(Finding(point, kind, message))

    def check(self, point: str, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Check `directory`; a process that the check leaves behind is ended."""
        self._acknowledged += len(acknowledged)
        try:
            self._workload.check(directory, acknowledged)
        except Violation as violation:
            self.add(point, violation.kind, str(violation))
        except BaseException as error:  # noqa: BLE001 - sys.exit() and pytest.fail() too mean a failed check
            if os.getpid() != self._process:
                os._exit(FAILED)  # a fork made by the check: its parent sees the status
            self.add(point, "other", f"{type(error).__name__}: {error}")
        _end_children()


def _end_children() -> None:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return
    end_descendants()


class NothingToTestError(LimpetError):
    """The workload did nothing that could be tested; for instance, it changes no file."""


def require_positive(**arguments: int) -> None:
    """Raise InvalidInputError for the first argument that is less than 1."""
    for name, value in arguments.items():
        if value < 1:
            raise InvalidInputError(f"{name} is {value}, but must be 1 or more")
