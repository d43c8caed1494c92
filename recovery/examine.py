"""From what was seen of one container to its verdict, so that whatever goes wrong with it stays its own."""

from msgspec.structs import replace

from limpet.recovery.evidence import Boot, Bundle, Observation, Process
from limpet.recovery.looks import Seen
from limpet.recovery.rules import Ruling, Verdict, decide
from limpet.schema.status import Reason, Status

_NOT_OBSERVED = Observation(boot=Boot.UNREADABLE, process=Process.HIDDEN, bundle=Bundle.HIDDEN)


def examine(checkpoint: Status, seen: Seen, *, now: int, damage: str = "") -> tuple[Observation, Verdict, str]:
    """Return what was seen of a container, the verdict, and what went wrong on the way, if anything.

    `checkpoint` is the status as it is on disk; `damage` says why it cannot be believed, if so.
    """
    if damage:
        return _NOT_OBSERVED, decide(checkpoint, _NOT_OBSERVED, now=now, damage=damage), damage
    if seen.observation is None:
        return _NOT_OBSERVED, could_not_observe(checkpoint, seen.problem), seen.problem
    try:
        return seen.observation, decide(checkpoint, seen.observation, now=now), ""
    except Exception as error:  # noqa: BLE001  # what a foreign probe returns may be anything
        problem = f"{type(error).__name__}: {error}"
        return _NOT_OBSERVED, could_not_observe(checkpoint, problem), problem


def could_not_observe(status: Status, problem: str) -> Verdict:
    """Return the verdict on a container of which nothing could be seen, or nothing that makes sense: Unknown."""
    because = f"it could not be observed: {problem}"
    return Verdict(
        rule="not-observed",
        ruling=Ruling.UNKNOWN,
        status=replace(status, unknown=True, reason=Reason.UNVERIFIED, message=because),
        actions=(),
        because=because,
    )
