"""What the log of changes costs: checkpoints that change a state, with it, with less in its place, and without it."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace

from limpet.benchmarks.checkpoints import CONTAINERS, require_kept
from limpet.benchmarks.contenders import ENDED, RUNNING, Limpet, container_id
from limpet.benchmarks.figures import Cell, Figures
from limpet.benchmarks.load import Load, run_threads
from limpet.engine.store import Store
from limpet.schema.codec import state_of
from limpet.schema.events import EventKind
from limpet.schema.history import KEPT_TRANSITIONS
from limpet.schema.rows import EventRow, NameRow, OpenEvent

_FULL = 10_000
"""So many events are kept: from then on old ones are dropped."""
_DRAFT = "limpet.engine.store.draft"
_LOG = "limpet.engine.database.sqlite.event_log.EventLog"
_MAKE_HISTORY = """
CREATE TABLE IF NOT EXISTS transition (
    node TEXT NOT NULL, id TEXT NOT NULL, number INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL,
    state INTEGER NOT NULL, exit_code INTEGER NOT NULL, reason TEXT NOT NULL, message TEXT NOT NULL,
    PRIMARY KEY (node, id, number),
    FOREIGN KEY (node, id) REFERENCES container (node, id) ON DELETE CASCADE) WITHOUT ROWID, STRICT"""
_ADD_TO_HISTORY = "INSERT INTO transition VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PRUNE_HISTORY = "DELETE FROM transition WHERE node = ? AND id = ? AND number <= ?"


class StateChanges(Limpet):
    """limpet's store, where each checkpoint of a container ends it, or lets it run again."""

    def open(self, count: int) -> None:
        """Make a store whose log is as long as it ever is."""
        super().open(count)
        for turn in range(_FULL // count + 2):
            with self.store.transaction() as changes:
                for number in range(count):
                    changes.replace(container_id(number), RUNNING if turn % 2 else ENDED)
        with self.store.transaction() as changes:
            for number in range(count):
                changes.replace(container_id(number), RUNNING)

    def checkpoint(self, number: int, turn: int) -> None:
        """Call `Store.checkpoint`; a caller comes to each container once in `CONTAINERS` turns."""
        ends = turn // CONTAINERS % 2 == 0
        status = replace(ENDED, exit_code=turn) if ends else replace(RUNNING, pid=turn)
        self.store.checkpoint(container_id(number), status)

    def read_back(self, numbers: Iterable[int]) -> dict[int, int]:
        """Open the store again and ask it."""
        with Store.open(self.state_dir) as store:
            statuses = {number: store.status(container_id(number)) for number in numbers}
        return {number: status.exit_code or status.pid for number, status in statuses.items()}


class SameState(StateChanges):
    """The same store, where no checkpoint changes a state."""

    def checkpoint(self, number: int, turn: int) -> None:
        """Call `Store.checkpoint`."""
        self.store.checkpoint(container_id(number), replace(RUNNING, pid=turn))


def measure_changes(cell: Cell) -> Figures:
    """Let one caller checkpoint for a given time."""
    state, _, log = cell.contender.partition("-")
    contender = (StateChanges if state == "change" else SameState)(cell.directory)
    with _LOGS[log]():
        contender.open(CONTAINERS)
        finished = run_threads(Load(1, CONTAINERS, seconds=cell.seconds), contender.checkpoint)
        contender.close()
        require_kept(contender, finished.kept)
    return {key: finished.figures[key] for key in ("p50_us", "p99_us", "per_second", "cpu_us")}


@contextmanager
def _whole() -> Iterator[None]:
    yield


@contextmanager
def _without() -> Iterator[None]:
    """Let no store of this process note what a container's checkpoint has changed."""
    with patch(f"{_DRAFT}.Draft._note", lambda *_: None):
        yield


@contextmanager
def _with_history() -> Iterator[None]:
    """Let a row of a history, as limpet wrote it before it had a log of changes, take the place of each event."""
    with (
        patch(f"{_DRAFT}.Draft._note", _note_transition),
        patch(f"{_DRAFT}.seal_event", _do_not_seal),
        patch(f"{_LOG}.append", _add_to_history),
        patch(f"{_LOG}.confirm", lambda _: None),
    ):
        yield


def _note_transition(self: Any, kind: EventKind, container_id: str, row: Any, status: Any) -> None:
    if kind in {EventKind.ADDED, EventKind.STATE}:
        self._open_events.append(
            OpenEvent(
                time.time_ns(),
                kind.value,
                NameRow(container_id, "", "", "{}"),
                row.seq,
                row.transitions,
                int(state_of(status)[0]),
                status.exit_code,
                status.reason,
                status.message,
            )
        )


def _do_not_seal(_: str, revision: int, last_revision: int, event: OpenEvent) -> EventRow:
    at, kind, names, *rest = event
    return EventRow._make((revision, last_revision, at, kind, *names[:4], *rest, 0))


def _add_to_history(self: Any, connection: Any, changes: Any) -> None:
    if not self.__dict__.get("has_history"):
        connection.execute(_MAKE_HISTORY)
        self.has_history = True
    for row in changes.events:
        values = (row.id, row.number, row.seq, row.at, row.state, row.exit_code, row.reason, row.message)
        if row.kind in {EventKind.ADDED, EventKind.STATE}:
            connection.execute(_ADD_TO_HISTORY, (self._node, *values))
            if row.number > KEPT_TRANSITIONS:
                connection.execute(_PRUNE_HISTORY, (self._node, row.id, row.number - KEPT_TRANSITIONS))


_LOGS = {"": _whole, "history": _with_history, "unlogged": _without}
