"""What is sent from memory is what lies on the disk, and where memory does not have all of it the disk is read."""

import pytest
from msgspec.structs import replace

from limpet import Store
from limpet.engine.database.sqlite.extract import Extractor
from limpet.engine.fleet import batch
from limpet.engine.fleet.recent import MOST, Recent
from limpet.schema.status import end
from tests.fleet.conftest import Base
from tests.fleet.test_shipping import fleet_rows, local_rows
from tests.records import RUNNING, metadata, sandbox


def test_what_was_just_written_is_not_read_from_the_disk(
    base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statuses with and without events; anything else is read, and so is what a failed sending had taken."""
    reads: list[object] = []
    extract = Extractor.extract

    def note(self: Extractor, *arguments: object) -> object:
        reads.append(arguments)
        return extract(self, *arguments)  # type: ignore[arg-type]

    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as store:
        store.add_sandbox(sandbox())
        for key in "abc":
            store.add(metadata(key), RUNNING)
        store.update("a", lambda status: replace(status, pid=1))
        monkeypatch.setattr(Extractor, "extract", note)
        store.update("a", lambda status: replace(status, pid=2))
        store.update("b", lambda status: end(status, 3, finished_at=9))
        store.update("a", lambda status: replace(status, extra={"k": "\x00\x1a"}))
        assert not reads
        assert fleet_rows(base) == local_rows(state_dir)
        reads.clear()
        base.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE %s", "limpet n7%")
        store.update("a", lambda status: replace(status, pid=3))
        store.update("c", lambda status: replace(status, pid=4, paused=True))
        assert fleet_rows(base) == local_rows(state_dir)
        reads.clear()
        store.delete("b")
        assert reads
        store.add(metadata("b"), RUNNING)
        store.update("b", lambda status: replace(status, pid=5))
        assert fleet_rows(base) == local_rows(state_dir)


def test_the_disk_is_looked_at_now_and_then(base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves the log there leaves the fleet, too, whatever a node writes."""
    monkeypatch.setattr(batch, "LEASE_SECONDS", 3600)
    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        reads = 0
        extract = Extractor.extract

        def note(self: Extractor, *arguments: object) -> object:
            nonlocal reads
            reads += 1
            return extract(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Extractor, "extract", note)
        for turn in range(4):
            with store.transaction() as draft:
                for each in range(MOST // 2):
                    draft.replace("a", replace(RUNNING, extra={"turn": turn, "each": each}))
        assert 1 <= reads <= 3
        assert fleet_rows(base) == local_rows(state_dir)


def test_memory_that_lacks_something_is_of_no_use(state_dir: str) -> None:
    """A gap, anything but statuses, too many, what was sent before from a disk that was ahead, and what came before."""
    with Store.open(state_dir, node="n7") as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        with store.transaction() as draft:
            draft.replace("a", end(RUNNING, 3, finished_at=9))
            draft.end_transaction()
            changes = draft.changes.copy()
    after = changes.events[0].revision - 1
    extractor = Extractor(f"{state_dir}/store.db", "n7")
    before = extractor.extract((0, 10), lambda _: {})
    extractor.close()
    before.newest = after

    def know(*, after: int) -> Recent:
        recent = Recent(after)
        recent.add(changes)
        return recent

    recent = know(after=after)
    recent.add(changes)
    found = recent.extract(after, before)
    assert found is not None
    assert (found.events, found.reached) == (changes.events, changes.events[-1].revision)
    assert [row[0] for row in found.rows["container_status"]] == ["a"]
    assert know(after=after - 1).extract(after - 1, before) is None  # a gap
    assert recent.extract(after - 1, before) is None
    assert recent.extract(after, None) is None
    before.newest = after + 2
    assert recent.extract(after, before) is None
    before.newest = after
    recent.spoil()
    assert recent.extract(after, before) is None
    assert recent.follow().extract(found.reached, found) is not None
    changes.deleted_containers.append("b")
    assert know(after=after).extract(after, before) is None
