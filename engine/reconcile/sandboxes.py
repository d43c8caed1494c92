"""The sandboxes in a recovery pass: those of another boot are found out, and NOTREADY from then on."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial

from limpet.engine.store import Draft, Record, Store
from limpet.recovery.report import SandboxFinding, make_damaged_finding, make_sandbox_finding
from limpet.recovery.sandbox_rules import UNREMARKABLE, SandboxVerdict, decide_sandbox
from limpet.schema.errors import LimpetError
from limpet.schema.sandbox_status import SandboxState, SandboxStatus


def judge_sandboxes(
    statuses: Mapping[str, SandboxStatus],
    read_containers: Callable[[], Iterable[Record]],
    *,
    boot_id: str | None,
    now: int,
    is_copied: bool = False,
) -> dict[str, SandboxVerdict]:
    """Return the verdict on each sandbox, given its status on disk: see `decide_sandbox`.

    `read_containers` is called where only they may tell in which boot one was made ready.
    """
    unrecorded = {key for key, each in statuses.items() if each.state is SandboxState.READY and not each.boot_id}
    used_in = _find_boots(read_containers(), unrecorded) if unrecorded else {}
    return {
        key: decide_sandbox(status, boot_id=boot_id, now=now, used_in=used_in.get(key, ()), is_copied=is_copied)
        for key, status in statuses.items()
    }


def find_remarkable(
    statuses: Mapping[str, SandboxStatus], verdicts: Mapping[str, SandboxVerdict], damaged: Mapping[str, str]
) -> tuple[SandboxFinding, ...]:
    """Return the report's entries for those sandboxes of which there is something to say.

    `damaged` tells, by the id of each sandbox whose record cannot be read, what is wrong with it.
    """
    return (
        *(
            make_sandbox_finding(key, statuses[key], verdict)
            for key, verdict in verdicts.items()
            if verdict.rule not in UNREMARKABLE
        ),
        *(make_damaged_finding(key, damage) for key, damage in sorted(damaged.items())),
    )


def recover_sandboxes(store: Store, draft: Draft, *, boot_id: str | None, now: int) -> tuple[SandboxFinding, ...]:
    """Put what is true of the sandboxes into the draft, and return what is to be said of them."""
    statuses = {metadata.id: draft.sandbox_status(metadata.id) for metadata in store.list_sandboxes()}
    verdicts = judge_sandboxes(statuses, store.list, boot_id=boot_id, now=now)
    for key, verdict in verdicts.items():
        if verdict.status != statuses[key]:
            draft.update_sandbox(key, partial(_choose, verdict.status))
    return find_remarkable(statuses, verdicts, store.damaged_sandboxes)


def _choose(new: SandboxStatus, _: SandboxStatus) -> SandboxStatus:
    return new


def _find_boots(containers: Iterable[Record], sandbox_ids: Collection[str]) -> dict[str, set[str]]:
    """Return for each of these sandboxes the boots in which processes of its containers ran."""
    found: dict[str, set[str]] = {}
    for record in containers:
        if record.status.identity is None:
            continue
        with suppress(LimpetError):  # a damaged record tells nothing
            sandbox_id = record.metadata.sandbox_id
            if sandbox_id in sandbox_ids:
                found.setdefault(sandbox_id, set()).add(record.status.identity.boot_id)
    return found
