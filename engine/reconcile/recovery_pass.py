"""The recovery pass: gather, decide, commit all verdicts in one transaction, then act.

A kill before the commit leaves everything as it was. A kill after it leaves verdicts whose actions are still to
be done: the next pass sees the same world and decides the same. A container that changes while the pass looks
at it (its process ends, and the watcher writes that down) keeps what was written: the verdict is dropped.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from msgspec.structs import replace

from limpet.engine.reconcile.sandboxes import recover_sandboxes
from limpet.engine.store import Draft, Store, Unsettled
from limpet.recovery.examine import could_not_observe, examine
from limpet.recovery.host import read_boot_id
from limpet.recovery.looks import LOOK_TIMEOUT_SECONDS, Seen, look_at_all
from limpet.recovery.orphans import Orphan
from limpet.recovery.probe import HostProbe, Probe
from limpet.recovery.report import Finding, Report, make_finding
from limpet.recovery.rules import Action, Ruling, Verdict
from limpet.schema.any_text import encode_any
from limpet.schema.errors import InvalidInputError, LimpetError, NotFoundError
from limpet.schema.status import ContainerState, Reason

Actor = Callable[[str, Verdict], None]
"""Carries out one action for the container with this id. What it raises goes into the report."""


_NOT_LOOKED_AT = Seen(None, "its record is damaged")


class Examined(NamedTuple):
    """A container, what is said of it, and the report's entry."""

    container: Unsettled
    verdict: Verdict
    finding: Finding


def recover(
    store: Store,
    *,
    probe: Probe | None = None,
    leftovers: Sequence[str] = (),
    actors: Mapping[Action, Actor] | None = None,
    orphans: Sequence[Orphan] = (),
    look_timeout: float = LOOK_TIMEOUT_SECONDS,
) -> Report:
    """Find out what is true of every container that has not ended, write it down, and return the report.

    So it is with the sandboxes: one that was made ready in another boot is NOTREADY.

    A runtime with processes of its own passes its `probe`, and reads in the report what is left to do. Released
    containers are looked at if they are among `leftovers`: those whose bundle is still there. `actors` carry out
    actions; the engine brings them, with the `orphans` it has judged. A look that takes longer than `look_timeout`
    seconds, or raises, makes its own container Unknown, with that reason, and no other.
    """
    begun, now, boot_id = time.monotonic_ns(), time.time_ns(), read_boot_id()
    probe = probe or HostProbe()
    containers = store.unsettled(leftovers)
    settled = len(store) - len(containers)
    examined = examine_all(containers, probe, now, look_timeout)
    with store.transaction() as draft:
        # A container that has changed since it was looked at keeps that change: its verdict is dropped.
        examined = [applied for one in examined if (applied := _apply(draft, one)) is not None]
        report = Report(
            number=store.next_report_number(),
            at=now,
            took_ns=time.monotonic_ns() - begun,
            boot_id=boot_id or "",
            settled=settled,
            findings=tuple(one.finding for one in examined),
            orphans=tuple(orphans),
            sandboxes=recover_sandboxes(store, draft, boot_id=boot_id, now=now),
        )
        draft.add_report(report.number, now, encode_any(report).decode())
    findings = _act_on(store, examined, probe, actors or {}, look_timeout)
    return replace(report, findings=findings, took_ns=time.monotonic_ns() - begun)


def reexamine(
    store: Store,
    container_id: str,
    *,
    probe: Probe,
    actors: Mapping[Action, Actor],
    look_timeout: float = LOOK_TIMEOUT_SECONDS,
) -> Finding | None:
    """Find out what is true of one container, and write it down; None if it has ended, or is gone."""
    findings = _act_on(store, _look_again(store, {container_id}, probe, look_timeout), probe, actors, look_timeout)
    return findings[0] if findings else None


def examine_all(
    containers: Sequence[Unsettled], probe: Probe, now: int, look_timeout: float = LOOK_TIMEOUT_SECONDS
) -> "list[Examined]":
    """Look at each container and decide; nothing is touched and nothing is written."""
    looked_at = [one for one in containers if not one.damage]
    seen = look_at_all([one.record for one in looked_at], probe, timeout_seconds=look_timeout)
    seen_of = {one.record.id: each for one, each in zip(looked_at, seen, strict=True)}
    examined = []
    for container in containers:
        record, damage = container
        observation, verdict, problem = examine(
            record.status, seen_of.get(record.id, _NOT_LOOKED_AT), now=now, damage=damage
        )
        finding = make_finding(record.id, record.status, observation, verdict, problem)
        examined.append(Examined(container, verdict, finding))
    return examined


def _apply(draft: Draft, one: Examined) -> Examined | None:
    """Put one verdict into the draft, and return it; None if the container has changed since it was looked at."""
    record, verdict = one.container.record, one.verdict
    if record.id not in draft or (not one.container.damage and draft.checkpoint(record.id) != record.status):
        return None
    if verdict.ruling is Ruling.UNKNOWN:
        draft.doubt(record.id, (verdict.status.reason, verdict.status.message))
    elif verdict.status == record.status:
        draft.doubt(record.id, None)
    else:
        try:
            draft.replace(record.id, verdict.status)
        except InvalidInputError as error:  # a foreign probe may say what no record can hold
            verdict = could_not_observe(record.status, str(error))
            finding = make_finding(record.id, record.status, one.finding.observation, verdict, str(error))
            one = Examined(one.container, verdict, finding)
            draft.doubt(record.id, (verdict.status.reason, verdict.status.message))
    return one


def _look_again(store: Store, ids: Collection[str], probe: Probe, look_timeout: float) -> "list[Examined]":
    """Look at these containers and write down what is true of them; return those that have not changed meanwhile."""
    containers = [one for one in store.unsettled() if one.record.id in ids]
    examined = examine_all(containers, probe, time.time_ns(), look_timeout)
    if not examined:
        return []
    with store.transaction() as draft:
        return [applied for one in examined if (applied := _apply(draft, one)) is not None]


def _act_on(
    store: Store, examined: Sequence[Examined], probe: Probe, actors: Mapping[Action, Actor], look_timeout: float
) -> tuple[Finding, ...]:
    """Carry out what follows from the verdicts. What has ended since it was seen alive is looked at once more."""
    gone: set[str] = set()
    findings = {one.finding.id: _act(store, one, actors, gone) for one in examined}
    with suppress(LimpetError):  # then they stay Unknown until the next pass
        for one in _look_again(store, gone, probe, look_timeout) if gone else ():
            findings[one.finding.id] = _act(store, one, actors, set())
    return tuple(findings.values())


def _act(store: Store, one: Examined, actors: Mapping[Action, Actor], gone: set[str]) -> Finding:
    """Carry out what follows from one verdict; add it to `gone` if it cannot be watched as it is not there any more."""
    finding = one.finding
    for action in one.verdict.actions:
        try:
            if action in actors:
                actors[action](finding.id, one.verdict)
        except Exception as error:  # noqa: BLE001  # one container's trouble is reported, the others go on
            finding = replace(finding, problem=f"{action.value}: {error}")
            if action is Action.ADOPT:
                finding = _doubt(store, finding, f"it was seen alive, and cannot be watched: {error}; recover again")
                if isinstance(error, NotFoundError):
                    gone.add(finding.id)
    return finding


def _doubt(store: Store, finding: Finding, why: str) -> Finding:
    """Flag a container Unknown whose end nobody would see: RUNNING would be said of it for ever."""
    with store.transaction() as draft:
        if finding.id in draft:
            draft.doubt(finding.id, (Reason.UNVERIFIED, why))
    return replace(finding, state=ContainerState.UNKNOWN.name, because=f"{finding.because}; {why}")
