"""What a store says from memory: of what there was when it was opened, and after each change."""

import time
from typing import Any

import pytest
from msgspec.structs import replace

from limpet import Store, errors
from limpet.schema import ContainerState, Status
from limpet.schema.deadline import DeadlineKind
from tests.records import RUNNING, metadata, sandbox

pytestmark = pytest.mark.usefixtures("database")

HOUR = 3600 * 10**9
LATER = 2**62
"""Nanoseconds since the epoch, far ahead."""

# Of each status: whether it is Unknown to who has just opened the store, and whether somebody has to see to it.
STATUSES: dict[str, tuple[Status, bool, bool]] = {
    "new": (Status(), True, False),
    "created": (Status(created_at=1), True, False),
    "running": (RUNNING, True, False),
    "ended": (replace(RUNNING, finished_at=3), False, False),
    "given-up": (Status(created_at=1, released=True), False, False),
    "released": (replace(RUNNING, finished_at=3, released=True), False, False),
    "expires": (Status(created_at=1, expires_at=LATER), True, True),
    "expired": (replace(RUNNING, finished_at=3, expires_at=4), False, True),
    "expired-and-released": (replace(RUNNING, finished_at=3, expires_at=4, released=True), False, False),
    "paused": (replace(RUNNING, paused=True), True, True),
}


def test_who_opens_a_store_vouches_for_nothing_that_has_not_ended(state_dir: str) -> None:
    """What the next one says of each status is on disk, and in the lists of what runs, expires and is not settled."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for key, (status, _, _) in STATUSES.items():
            store.add(metadata(key), status)
        before = {key: store.status(key) for key in STATUSES}
        assert not any(status.unknown for status in before.values())
    with Store.open(state_dir) as store:
        after = {key: store.status(key) for key in STATUSES}
        assert {key for key in after if after[key].unknown} == {key for key in STATUSES if STATUSES[key][1]}
        told = {key: replace(status, unknown=False, message="", reason="") for key, status in after.items()}
        assert told == before
        assert store.list_intended() == sorted(key for key in STATUSES if STATUSES[key][2])
        assert {each.id for each in store.list(state=ContainerState.UNKNOWN)} == {
            key for key in STATUSES if STATUSES[key][1]
        }


def test_only_what_is_unknown_is_settled_by_a_persons_word(state_dir: str) -> None:
    """Who runs, as far as this process has seen, is not declared gone."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("one"), RUNNING)
        with pytest.raises(errors.InvalidStateError, match="it is RUNNING, not Unknown"):
            store.declare_gone("one", "I have seen it")
        assert store.status("one") == RUNNING
        store.add(metadata("new"))
        with pytest.raises(errors.InvalidStateError, match="gone: it was never created, and has no process; delete it"):
            store.declare_gone("new", "I have seen it")
    with Store.open(state_dir) as store:
        assert store.declare_gone("one", "I have seen it").exit_code == 255
        assert store.status("one").state is ContainerState.EXITED


def test_a_wall_clock_that_is_set_brings_nothing_nearer(
    store: Store, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what was written with the time, in this store and the next; not of a container that is gone."""
    wall = time.time_ns()
    at = wall + HOUR
    for key in ("one", "two"):
        store.add(metadata(key), Status(created_at=1))
        store.update(key, lambda old: replace(old, expires_at=at))
    store.delete("two")
    with monkeypatch.context() as patched:
        patched.setattr("limpet.engine.store.deadlines.time.time_ns", lambda: wall + 2 * HOUR)
        assert HOUR * 0.9 < store.time_left(DeadlineKind.EXPIRY, "one", at) <= HOUR
        assert store.time_left(DeadlineKind.EXPIRY, "two", at) == 0
        store.close()
        with Store.open(state_dir) as again:
            assert HOUR * 0.9 < again.time_left(DeadlineKind.EXPIRY, "one", at) <= HOUR


def test_events_in_memory_are_told_up_to_the_oldest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that follows is there, or all are read from disk; the same either way."""
    monkeypatch.setattr("limpet.engine.store.memory._RECENT", 4)
    memory: Any = store._memory
    memory.recent = type(memory.recent)(maxlen=4)
    store.add(metadata("one"), Status())
    for number in range(8):
        store.update("one", lambda old, number=number: replace(old, message=f"{number}", created_at=number + 1))  # type: ignore[misc]
    newest = store.revision
    for after in range(newest + 2):
        page = store.recent_events(after, 100)
        assert (page is None) == (newest - after > len(memory.recent))
        expected = [*range(after + 1, newest + 1)]
        assert [row.revision for row in store.load_events(after, 100).rows] == expected
        assert page is None or [row.revision for row in page.rows] == expected


def test_doubts_are_the_same_object_until_one_changes(state_dir: str) -> None:
    """A sender to a fleet need not compare thousands at each change."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for key in ("one", "two"):
            store.add(metadata(key), RUNNING)
    with Store.open(state_dir) as store:
        memory = store._memory
        doubts = memory.copy_doubts()
        assert set(doubts) == {"one", "two"}
        store.add(metadata("three"), Status())
        assert memory.copy_doubts() is doubts
        store.declare_gone("one", "it is")
        assert set(memory.copy_doubts()) == {"two"}
        assert set(doubts) == {"one", "two"}


def test_a_sandbox_that_is_not_there_has_no_status(store: Store) -> None:
    """Neither a status nor a version."""
    for ask in (store.sandbox_status, store.sandbox_version):
        with pytest.raises(errors.NotFoundError, match="sandbox 'none' does not exist"):
            ask("none")
