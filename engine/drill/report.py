"""The result of a drill: counts, and for each failure what was expected, what was reported, and how to repeat it."""

import statistics
from collections.abc import Sequence

import msgspec

from limpet.engine.drill.judge import Kind


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One false statement or wrong action of an engine."""

    round: int
    container: str
    kind: Kind
    expected: str
    said: str


class RecoveryTime(msgspec.Struct, frozen=True, kw_only=True):
    """The time to open an engine, with its recovery pass, in whole milliseconds."""

    p50: int = 0
    max: int = 0


class DrillReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a drill."""

    seed: int
    rounds: int
    """Lives ended by a kill."""
    kills: int
    """Kills of an engine, including kills during a recovery."""
    containers: int
    """Containers that existed."""
    acknowledged: int
    """Calls that returned without being refused."""
    lost: int
    torn: int
    false_running: int
    false_exited: int
    wrong_exit_code: int
    leaked: int
    harmed: int
    broken: int
    unknown: int
    """Containers that a recovery reported as UNKNOWN."""
    unseen: int = 0
    """Containers of whose end it was said that nobody saw it. Only where all keepers were killed, or in a reboot."""
    stranded: int = 0
    """Ended containers of which processes are left, after all keepers were killed: nobody tells whose they are."""
    keeper_kills: int = 0
    """Kills of the keeper's processes: keeper, copier, or all of them."""
    judged: int = 0
    """Containers that were compared with the truth after a recovery, over all recoveries."""
    reused: int = 0
    """Pids of containers that other processes were given."""
    reboots: int = 0
    recovery_ms: RecoveryTime
    failures: tuple[Failure, ...]
    repeat: str
    """The command that repeats the drill's plan."""

    @property
    def passed(self) -> bool:
        """True if no statement was false and nothing was lost, torn, leaked or harmed."""
        return not self.failures


def count_kinds(failures: Sequence[Failure]) -> dict[str, int]:
    """Return the number of failures of each kind."""
    return {kind.value: sum(failure.kind is kind for failure in failures) for kind in Kind}


def summarize_times(nanoseconds: Sequence[int]) -> RecoveryTime:
    """Return the median and the maximum."""
    if not nanoseconds:
        return RecoveryTime()
    return RecoveryTime(p50=round(statistics.median(nanoseconds) / 1e6), max=round(max(nanoseconds) / 1e6))
