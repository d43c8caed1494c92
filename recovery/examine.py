"""From what was seen of one container to its verdict, so that whatever goes wrong with it stays its own."""

from msgspec.structs import replace

from limpet.recovery.evidence import Boot, Bundle, Observation, Process
from limpet.recovery.looks import Seen
from limpet.recovery.rules import DECLARE, Ruling, Verdict, decide
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
        observation = _see_whose(checkpoint, seen.observation)
        return observation, decide(checkpoint, observation, now=now), ""
    except Exception as error:  # noqa: BLE001  # what a foreign probe returns may be anything
        problem = f"{type(error).__name__}: {error}"
        return _NOT_OBSERVED, could_not_observe(checkpoint, problem), problem


_PERHAPS_ALIVE = {
    Process.ALIVE,
    Process.HELD,
    Process.PAUSED,
    Process.MONITOR_GONE,
    Process.UNPROVEN,
    Process.HIDDEN,
    Process.ELSEWHERE,
    Process.NONE,
}


def _see_whose(checkpoint: Status, observation: Observation) -> Observation:
    """Return the observation; a process that lives, or may, is the original's where the checkpoint was copied."""
    if checkpoint.reason != Reason.COPIED or observation.process not in _PERHAPS_ALIVE:
        return observation
    detail = "; ".join(filter(None, (checkpoint.message, observation.detail)))
    return replace(observation, process=Process.ORIGINAL, detail=detail)


def could_not_observe(status: Status, problem: str) -> Verdict:
    """Return the verdict on a container of which nothing could be seen, or nothing that makes sense: Unknown."""
    because = f"it could not be observed: {problem}; recover again, {DECLARE}"
    return Verdict(
        rule="not-observed",
        ruling=Ruling.UNKNOWN,
        status=replace(status, unknown=True, reason=Reason.UNVERIFIED, message=because),
        actions=(),
        because=because,
    )
