"""Observes and decides for one container, so that an error affects only that container."""

from msgspec.structs import replace

from limpet.recovery.evidence import Boot, Bundle, Observation, Process
from limpet.recovery.probe import Probe, Subject
from limpet.recovery.rules import Ruling, Verdict, decide
from limpet.schema.status import Reason, Status

_NOT_OBSERVED = Observation(boot=Boot.UNREADABLE, process=Process.HIDDEN, bundle=Bundle.HIDDEN)


def examine(container: Subject, probe: Probe, *, now: int, damage: str = "") -> tuple[Observation, Verdict, str]:
    """Return what was seen of a container, the verdict, and the error met on the way, if any.

    `container.status` is the checkpoint as on disk; `damage`, if not empty, says why it cannot be trusted. A probe may
    raise any exception: the container is then Unknown.
    """
    if damage:
        return _NOT_OBSERVED, decide(container.status, _NOT_OBSERVED, now=now, damage=damage), damage
    try:
        observation = probe.observe(container)
        return observation, decide(container.status, observation, now=now), ""
    except Exception as error:  # noqa: BLE001  # a probe is foreign code; one container must not stop the others
        problem = f"{type(error).__name__}: {error}"
        return _NOT_OBSERVED, _not_observed(container.status, problem), problem


def _not_observed(status: Status, problem: str) -> Verdict:
    because = f"it could not be observed: {problem}"
    return Verdict(
        rule="not-observed",
        ruling=Ruling.UNKNOWN,
        status=replace(status, unknown=True, reason=Reason.UNVERIFIED, message=because),
        actions=(),
        because=because,
    )
