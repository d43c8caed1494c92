"""Reads a state directory without its lock: while an engine is running, or while none is. Writes nothing.

The database holds checkpoints, which may no longer be true: a RUNNING checkpoint outlives its process, and the engine
that would record the exit may be dead. So each container that has not exited is observed, and is RUNNING only if
the same process is alive now. Otherwise it is Unknown: only an engine can find out how it ended, and record that.
"""

import os
import time
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice, takewhile
from typing import Any, NamedTuple, Self
from weakref import WeakSet

from msgspec.structs import replace

from limpet.engine.database.sqlite import Reader, Source, examine_wal, require_plausible_files
from limpet.engine.inspection.feed import SnapshotFeed
from limpet.engine.reconcile import examine_all, judge_sandboxes
from limpet.engine.starters import make_host_probe
from limpet.engine.state.descriptors import fill_standard_numbers, system_errors_told
from limpet.engine.state.directory import check_directory, require_ours, require_short
from limpet.engine.state.entries import require_entries, resolve_directory
from limpet.engine.state.identity import find_original
from limpet.engine.state.lock import find_holder
from limpet.engine.state.names import CONTAINERS, DATABASE, ENTRIES, SANDBOXES
from limpet.engine.state.owner import read_owner
from limpet.engine.state.presence import is_there
from limpet.engine.state.process_bound import ProcessBound
from limpet.engine.state.steps import may_be_called_again, run_whole, whole
from limpet.engine.store import (
    Filter,
    Listing,
    Named,
    Record,
    Unsettled,
    Wanted,
    Watch,
)
from limpet.recovery.evidence import Boot, Observation
from limpet.recovery.host import read_boot_id
from limpet.recovery.intents import restart_due_at
from limpet.recovery.rules import Ruling, Verdict
from limpet.recovery.sandbox_rules import SandboxVerdict
from limpet.schema.codec import (
    read_labels,
    row_is_sound,
    row_state,
    row_to_sandbox,
    row_to_sandbox_status,
    row_to_status,
)
from limpet.schema.errors import NotFoundError, StateDirectoryError, StoreDamagedError, quote_path
from limpet.schema.history import Transition
from limpet.schema.metadata import DEFAULT_NODE, Metadata, SandboxMetadata, require_node, require_text
from limpet.schema.rows import NameRow, SandboxRow, StatusRow
from limpet.schema.sandbox_status import SandboxStatus
from limpet.schema.status import ContainerState, Reason, Status, mark_copied, read_state

_READ_AGAIN_SECONDS = 0.05
_READ = {name: what for name, what in ENTRIES.items() if name.startswith((DATABASE, CONTAINERS, SANDBOXES))}
"""The entries that a snapshot reads; others may be anything."""


class View(NamedTuple):
    """One container: its record, and its actual status."""

    id: str
    name: str
    sandbox_id: str
    labels: Mapping[str, str]
    checkpoint: Status
    """The status on disk."""
    status: Status
    """The same if it is still true; otherwise Unknown, with a reason and a message."""
    observation: Observation | None = None
    """What was seen; None for an exited container, which is not observed."""
    verdict: Verdict | None = None
    """What a recovery pass would decide now; None if the container was not observed."""
    damage: str = ""
    """Why the record cannot be trusted, "" if it can."""
    restart_at: int = 0
    """When its restart policy makes the next attempt, in nanoseconds since the epoch; 0 if it does not."""


class SandboxView(NamedTuple):
    """One sandbox: its record, and its actual status."""

    metadata: SandboxMetadata
    checkpoint: SandboxStatus | None
    """The status on disk; None if it is damaged."""
    status: SandboxStatus | None
    """What a recovery pass would make of it now: the same, unless another boot has begun."""
    verdict: SandboxVerdict | None
    damage: str = ""


class Snapshot(ProcessBound):
    """The records at the time of opening; each container is observed when it is requested."""

    def __init__(self, path: str, node: str, source: Source) -> None:
        self.path = path
        self.node = node
        self.source = source
        """The database, for what is not kept in memory."""
        self.holder = find_holder(path)
        """The pid of the process that has the state directory open; None if none is visible."""
        self._probe = make_host_probe(os.path.join(path, CONTAINERS))
        self._original = find_original(path, node)
        self._watches: WeakSet[Watch] = WeakSet()
        self.revision, sandboxes, names, rows, sandbox_statuses = source.ask(lambda reader: reader.load_instant())
        """The revision is that of the newest event at the time of opening, 0 if there was none yet."""
        self._sandboxes = {row.id: row for row in sandboxes}
        self._sandbox_statuses = {row.id: row for row in sandbox_statuses}
        self._names = {row.id: row for row in names}
        self._rows = {row.id: row for row in rows}
        self._known = self._rows.keys() | self._names.keys()
        self._ids = sorted(self._known)

    @classmethod
    def open(cls, state_dir: str | os.PathLike[str], *, node: str = DEFAULT_NODE) -> Self:
        """Read the records of `node`.

        Raises NotFoundError if there is no state here, or none of this node; StateDirectoryError if this user cannot
        use the directory; StoreDamagedError, StoreTooNewError or another StoreError.
        """
        if may_be_called_again():
            return run_whole(lambda: cls._open(state_dir, node), cls.close)
        return cls._open(state_dir, node)

    @classmethod
    def _open(cls, state_dir: str | os.PathLike[str], node: str) -> Self:
        path = require_state(state_dir)
        node = require_node(node)
        fill_standard_numbers()
        require_entries(path, _READ)
        if find_holder(path) is None:
            require_sound_wal(path)
        source = Source(os.path.join(path, DATABASE), node)
        try:
            source.ask(lambda reader: reader.require_current())
            _require_node(path, node, source.ask(lambda reader: sorted(reader.epochs())))
            with system_errors_told(f"state directory {quote_path(path)}"):
                return cls(path, node, source)
        except BaseException:
            source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._ids)

    @whole
    def close(self) -> None:
        """Close the database, and end what watches it."""
        for watch in list(self._watches):
            watch.close()
        self.source.close()

    @property
    def ids(self) -> "Sequence[str]":
        """The id of every container."""
        return self._ids

    @property
    def names(self) -> "Sequence[str]":
        """The name of every container; several may have the same."""
        return [row.name for row in self._names.values()]

    @property
    def sandbox_names(self) -> "Sequence[str]":
        """The name of every sandbox; several may have the same."""
        return [row.name for row in self._sandboxes.values()]

    @property
    def sandbox_ids(self) -> "Collection[str]":
        """The id of every sandbox."""
        return self._sandboxes.keys()

    @whole
    def list(
        self,
        *,
        id: str = "",
        name: str = "",
        sandbox_id: str = "",
        state: ContainerState | str | None = None,
        labels: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
        ended: bool = True,
    ) -> "Listing[View]":
        """Return the containers that match all arguments, oldest first.

        Without `ended`, only those that have not exited, or wait for their restart.

        The list's `revision` is that of the newest event when the snapshot was opened. What is asked for is given as
        to `Store.list`. Raises InvalidInputError for a state that is none, and for what is no text.
        """
        wanted = Filter.of(id, name, sandbox_id, labels, extra)
        wanted_state = None if state is None else read_state(state)
        sandboxes = wanted.find_sandboxes(self._name_sandboxes())
        keys = [
            key
            for key in self._find_ids(wanted.id)
            if (ended or not self._has_ended(key) or key in self.restarts)
            and wanted.accepts(self._name(key), sandboxes)
        ]
        views = [
            view
            for view in self._views(keys)
            if wanted_state in {None, view.status.state} and wanted.accepts_extra(view.status.extra)
        ]
        return Listing(sorted(views, key=lambda view: (view.checkpoint.created_at, view.id)), self.revision)

    @whole
    def get(self, container_id: str) -> View:
        """Return the container with this id, else with this name, else the one whose id begins with it.

        Of several attempts of a name in one sandbox the newest is meant. Raises NotFoundError, or AmbiguousError.
        """
        (view,) = self._views([self.resolve(container_id)])
        return view

    @whole
    def resolve(self, container_id: str) -> str:
        """Return the whole id of the container that is meant: see `get`."""
        named = (Named.container(row) for row in self._names.values() if row.name == container_id)
        return Named.resolve(container_id, self._known, lambda: named, "container", self._find_ids)

    def _find_ids(self, beginning: str) -> "Iterator[str]":
        """Return the ids that begin so, in order."""
        first = bisect_left(self._ids, beginning)
        return takewhile(lambda key: key.startswith(beginning), islice(self._ids, first, None))

    @whole
    def resolve_sandbox(self, sandbox_id: str) -> str:
        """Return the whole id of the sandbox with this id, name, or beginning of an id.

        Raises NotFoundError, AmbiguousError if several are meant.
        """
        found = [row for row in self._sandboxes.values() if row.name == sandbox_id]
        return Named.resolve(sandbox_id, self._sandboxes, lambda: map(self._name_sandbox, found), "sandbox")

    @whole
    def sandbox(self, sandbox_id: str) -> SandboxMetadata:
        """Return the sandbox with this id, else with this name, else the one whose id begins with it.

        Raises NotFoundError, AmbiguousError if several are meant, StoreDamagedError.
        """
        return row_to_sandbox(self.node, self._sandboxes[self.resolve_sandbox(sandbox_id)])

    @whole
    def view_sandbox(self, sandbox_id: str) -> SandboxView:
        """Return the sandbox that `sandbox` does, and its status. Raises what that does."""
        metadata = self.sandbox(sandbox_id)
        try:
            status = self._sandbox_status(metadata.id)
        except StoreDamagedError as error:
            return SandboxView(metadata, None, None, None, str(error))
        verdict = self.judge_sandboxes({metadata.id: status})[metadata.id]
        return SandboxView(metadata, status, verdict.status, verdict)

    @whole
    def sandbox_statuses(self) -> Mapping[str, SandboxStatus]:
        """Return the status on disk of each sandbox whose record can be read."""
        found = {}
        for key in self._sandboxes:
            with suppress(StoreDamagedError):
                self.sandbox(key)
                found[key] = self._sandbox_status(key)
        return found

    @whole
    def damaged_sandboxes(self) -> Mapping[str, str]:
        """Return what is wrong with each sandbox whose record cannot be read, by its id."""
        found = {}
        for key in self._sandboxes:
            try:
                self.sandbox(key)
                self._sandbox_status(key)
            except StoreDamagedError as error:
                found[key] = str(error)
        return found

    @whole
    def judge_sandboxes(self, statuses: Mapping[str, SandboxStatus]) -> Mapping[str, SandboxVerdict]:
        """Return what a recovery pass would decide now, given the status of each sandbox on disk."""
        return judge_sandboxes(
            statuses,
            lambda: [each.record for each in self.checkpoints()],
            boot_id=read_boot_id(),
            now=time.time_ns(),
            is_copied=bool(self._original),
        )

    def _sandbox_status(self, sandbox_id: str) -> SandboxStatus:
        row = self._sandbox_statuses.get(sandbox_id)
        if row is None:
            raise StoreDamagedError(f"sandbox {sandbox_id}: its status is missing; restore a backup")
        return row_to_sandbox_status(self.node, row)

    @whole
    def metadata(self, container_id: str) -> Metadata:
        """Return the metadata of the container with exactly this id. Raises NotFoundError, StoreDamagedError."""
        key = require_text("container", container_id)
        return self.source.ask(lambda reader: reader.metadata(key))

    @whole
    def history(self, container_id: str) -> "Sequence[Transition]":
        """Return the recorded state changes of the container with exactly this id, oldest first."""
        key = require_text("container", container_id)
        return self.source.ask(lambda reader: reader.history(key))

    @whole
    def watch(
        self,
        since: int | None = None,
        *,
        id: str = "",
        name: str = "",
        sandbox_id: str = "",
        labels: Mapping[str, str] | None = None,
        kinds: Iterable[str] = (),
    ) -> Watch:
        """Return an iterator of the events that follow the revision `since`, that of the snapshot if none is given.

        It waits for what an engine does, also for one that is opened later; otherwise it is that of `Store.watch`. The
        snapshot itself stays as it is. Raises what `Store.watch` raises, and StoreReplacedError if the database was
        replaced.
        """
        wanted = Wanted(id, name, sandbox_id, labels, kinds)
        watch = Watch(SnapshotFeed(self.path, self.node), self.revision if since is None else since, wanted)
        self._watches.add(watch)
        return watch

    @whole
    def oldest_revision(self) -> int:
        """Return the revision of the oldest event that is kept, that of the next one if there is none."""
        return self.source.ask(lambda reader: reader.load_events(0, 0)).pruned + 1

    @cached_property
    @whole
    def restarts(self) -> Mapping[str, int]:
        """When the next attempt is due of each container that waits for its restart, in nanoseconds since the epoch."""
        try:
            restartable = self.source.ask(lambda reader: reader.load_restartable())
        except StoreDamagedError:  # what of it can be read is shown all the same
            return {}
        due = {key: self._find_restart(key) for key in restartable}
        return {key: at for key, at in due.items() if at}

    def _find_restart(self, key: str) -> int:
        row = self._rows.get(key)
        if row is None or not row.finished_at or row.released or row.stop_requested_at:
            return 0
        try:
            metadata = self.metadata(key)
            due = restart_due_at(metadata, row_to_status(row)) if row_is_sound(self.node, row) else 0
            following = (metadata.sandbox_id, metadata.name, metadata.config.metadata.attempt + 1)
            if not due or self.source.ask(lambda reader: reader.find_container_by_name(*following)) is not None:
                return 0
            statuses = self.source.ask(lambda reader: reader.load_sandbox_statuses())
            return 0 if any(one.id == metadata.sandbox_id and one.stopped_at for one in statuses) else due
        except (StoreDamagedError, NotFoundError):  # nothing is done to what cannot be read
            return 0

    def checkpoints(self) -> "Sequence[Unsettled]":
        """Return every record on disk, and why it cannot be trusted, if it cannot."""
        return [self._checkpoint(key, self._rows.get(key)) for key in self._ids]

    def _views(self, keys: "Sequence[str]") -> "Sequence[View]":
        """Observe those of the containers that have not exited, and return what is true of each."""
        views = {view.id: view for view in self._look({key: self._rows.get(key) for key in keys})}
        if self.holder is not None:
            # They may have exited since the rows were read, and their exits may be recorded by now.
            doubtful = [key for key in keys if views[key].status.unknown]
            newer = {key: self.source.ask(partial(Reader.load_status, container_id=key)) for key in doubtful}
            changed = {key: row for key, row in newer.items() if row is not None and row != self._rows.get(key)}
            views.update((view.id, view) for view in self._look(changed))
        return [views[key] for key in keys]

    def _look(self, rows: Mapping[str, StatusRow | None]) -> "Iterator[View]":
        checkpoints = [self._checkpoint(key, row) for key, row in rows.items()]
        to_look_at = [one for one in checkpoints if not one.record.status.finished_at]
        examined = {one.finding.id: one for one in examine_all(to_look_at, self._probe, time.time_ns())}
        for record, damage in checkpoints:
            name = self._name(record.id)
            labels = read_labels(name.labels)
            restart_at = self.restarts.get(record.id, 0)
            view = View(
                record.id,
                name.name,
                name.sandbox_id,
                labels,
                record.status,
                record.status,
                damage=damage,
                restart_at=restart_at,
            )
            if record.id in examined:
                verdict, observation = examined[record.id].verdict, examined[record.id].finding.observation
                status = say(record.status, observation, verdict, self.holder)
                view = view._replace(status=status, observation=observation, verdict=verdict)
            yield view

    def _checkpoint(self, key: str, row: StatusRow | None) -> Unsettled:
        status, damage = Status(), ""
        if row is None:
            damage = "its status row is missing"
        elif not row_is_sound(self.node, row):
            damage = "its status on disk does not match its checksum"
        else:
            try:
                status = row_to_status(row)
            except StoreDamagedError as error:
                damage = str(error)
        if self._original and status.identity is not None and not status.finished_at:
            status = mark_copied(status, self._original, self.path)  # as the next engine does, durably
        return Unsettled(Record(key, status, self.metadata), damage)

    def _has_ended(self, key: str) -> bool:
        row = self._rows.get(key)
        return row is not None and row_is_sound(self.node, row) and row_state(row)[0] is ContainerState.EXITED

    def _name_sandboxes(self) -> Mapping[str, str]:
        """Return the name of each sandbox by its id; nothing of one whose record is missing."""
        missing = {row.sandbox_id for row in self._names.values()} - self._sandboxes.keys()
        return dict.fromkeys(missing, "") | {key: row.name for key, row in self._sandboxes.items()}

    def _name_sandbox(self, row: SandboxRow) -> Named:
        try:
            return Named.sandbox(row_to_sandbox(self.node, row))
        except StoreDamagedError:
            return Named(row.id, row.id, 0)

    def _name(self, key: str) -> NameRow:
        return self._names.get(key) or NameRow(id=key, sandbox_id="", name="", labels="{}")


def say(checkpoint: Status, observation: Observation, verdict: Verdict, holder: int | None) -> Status:
    """Return the actual status of an observed container that has not exited according to its record.

    `holder` is the pid of a live engine that watches it, None if there is no such engine.
    """
    if verdict.ruling is Ruling.KEEP:
        return checkpoint
    if verdict.ruling in {Ruling.RUNNING, Ruling.UNKNOWN}:
        return verdict.status
    what = "the machine was rebooted" if observation.boot is Boot.CHANGED else "its process has ended"
    if holder is None:
        message = f"not verified; run limpet recover ({what})"
    else:
        message = f"not verified; {what}, and engine {holder} has not recorded that yet"
    return replace(checkpoint, unknown=True, reason=Reason.UNVERIFIED, message=message)


def require_state(state_dir: str | os.PathLike[str]) -> str:
    """Return the path of a state directory that contains state.

    Raises NotFoundError if there is none yet, StateDirectoryError if this user cannot use the directory,
    StoreDamagedError if something is missing from it.
    """
    path = resolve_directory(state_dir)
    try:
        if not is_there(path):
            raise NotFoundError(f"state directory {quote_path(path)} does not exist; give another with --state-dir")
        check_directory(path, is_read=True)
        require_short(path)
        require_ours(path)
        _require_plausible(path)
        if not is_there(os.path.join(path, DATABASE)):
            raise NotFoundError(f"state directory {path} is empty: no engine has opened it yet")
    except OSError as error:
        raise StateDirectoryError(f"state directory {path}: {error.strerror}; use one that you can read") from error
    return path


def _require_plausible(path: str) -> None:
    owner = read_owner(path)
    try:
        require_plausible_files(path, owner)
    except StoreDamagedError:
        if read_owner(path) == owner:
            raise
        require_plausible_files(path, read_owner(path))  # an engine was opened or closed meanwhile


def require_sound_wal(path: str) -> None:
    """Raise StoreDamagedError if the state directory's WAL proves that acknowledged commits would be lost."""
    require_entries(path, _READ)
    wal = os.path.join(path, DATABASE + "-wal")
    try:
        examine_wal(wal)
    except StoreDamagedError:
        # If an engine that we cannot see is writing to it, only this read was torn.
        time.sleep(_READ_AGAIN_SECONDS)
        examine_wal(wal)


def _require_node(path: str, node: str, found: Sequence[str]) -> None:
    if not found:
        raise NotFoundError(f"state directory {path} is empty: no engine has opened it yet")
    if node not in found:
        raise NotFoundError(f"{path} has no records of node {node!r}, only of {', '.join(map(repr, found))}")
