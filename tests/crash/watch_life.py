"""The store's life, watched: whoever watches is told of nothing that a crash takes back, and of everything else."""

from collections.abc import Callable, Sequence

from limpet.engine.drill.store_life import StoreLife, World
from limpet.engine.inspection.snapshot import Snapshot
from limpet.engine.store import Store
from limpet.schema.events import Event, EventKind
from limpet.testing import Violation

_EVENT = b"event "


class WatchLife(StoreLife):
    """Two look at the log at the first instant at which a commit can be seen: one in the process, and one beside it.

    Each event that they are given is acknowledged, and so must be in the log that a crash leaves.
    """

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        """Do every step, and acknowledge each event and each step."""
        world = World(directory, self.pragmas)
        cursors = {"within": 0, "beside": 0}
        looking: list[bool] = []

        def say(who: str, event: Event) -> None:
            cursors[who] = event.revision
            acknowledge(_EVENT + describe(event))

        def look() -> None:
            if world.opened.is_closed or looking:
                return
            looking.append(True)  # to end a watch rings, too
            with world.opened.watch(cursors["within"]) as watch:
                for event in iter(lambda: watch.next(0), None):
                    say("within", event)
            with Snapshot.open(world.state_dir) as snapshot, snapshot.watch(cursors["beside"]) as watch:
                for event in iter(lambda: watch.next(0), None):
                    say("beside", event)
            looking.clear()

        for number, step in enumerate(self._steps):
            before = world.store
            self.perform(step, world)
            if world.store is not before:
                world.opened._bells.add(self, look)
            acknowledge(b"%d" % number)

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Check the store as usual, then that its log has all that was seen, and tells all that is there."""
        super().check(directory, [each for each in acknowledged if not each.startswith(_EVENT)])
        seen = [each.removeprefix(_EVENT) for each in acknowledged if each.startswith(_EVENT)]
        with Store.open(f"{directory}/state") as store, store.watch(0) as watch:
            events = list(iter(lambda: watch.next(0), None))
            there = {record.id: record.status.pid for record in store.list()}
        lost = set(seen) - set(map(describe, events))
        if lost:
            raise Violation("lost", f"seen, and not in the log: {sorted(lost)}")
        if [event.revision for event in events] != list(range(1, len(events) + 1)):
            raise Violation("torn", f"the log is not whole: {[event.revision for event in events]}")
        told: dict[str, int] = {}
        for event in events:
            if event.kind is EventKind.DELETED:
                del told[event.id]
            elif event.status is not None:
                told[event.id] = event.status.pid
        if told.keys() != there.keys() or (events and not events[-1].is_last):
            raise Violation("torn", f"the log tells of {sorted(told)}, and there are {sorted(there)}")


def describe(event: Event) -> bytes:
    """Return what tells an event from any other."""
    return f"{event.revision} {event.commit} {event.kind} {event.id} {event.at} {event.seq}".encode()


class EarlyWatchLife(WatchLife):
    """The control: whoever watches is told before the commit."""

    def perform(self, step: object, world: World) -> None:
        """Do one step, of which the store tells too early."""
        write = Store._write

        def write_later(store: Store, draft: object) -> None:
            store._apply(draft)  # type: ignore[arg-type]
            write(store, draft)  # type: ignore[arg-type]

        setattr(Store, "_write", write_later)  # noqa: B010
        try:
            super().perform(step, world)  # type: ignore[arg-type]
        finally:
            setattr(Store, "_write", write)  # noqa: B010
