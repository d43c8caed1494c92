"""Looking at the fleet: what its nodes have sent, and of a node that is not heard of nothing that may be over."""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, Self

import msgspec
import psycopg
from msgspec.structs import replace

from limpet.engine.fleet.address import Address, Connection
from limpet.engine.fleet.rows import escape, from_record
from limpet.engine.fleet.shape import has_labels_of
from limpet.engine.fleet.upgrade import require_current
from limpet.engine.state.process_bound import ProcessBound
from limpet.schema.codec import (
    are_sound,
    label_text,
    read_labels,
    require_readable_status,
    row_to_event,
    row_to_metadata,
    row_to_status,
)
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import AmbiguousError, ClosedError, InvalidInputError, NotFoundError, StoreDamagedError, quote
from limpet.schema.events import Event
from limpet.schema.metadata import Metadata
from limpet.schema.rows import ContainerRow, EventRow, NameRow, StatusRow
from limpet.schema.status import ContainerState, Reason, Status, read_state

_doubts = make_decoder(dict[str, tuple[str, str]])
_POLL_SECONDS = 0.5
_PAGE = 256
_WIDTH = 1 + len(NameRow._fields)
"""So many columns stand before those of a status."""

_NODES = """
SELECT name, epoch, host, pid, path, as_of, revision, is_whole, doubts, lease_seconds,
    extract(epoch FROM clock_timestamp() - heard_at)::float8,
    CASE WHEN %(is_counted)s THEN (SELECT count(*) FROM container WHERE container.node = fleet_node.name) ELSE 0 END
FROM fleet_node WHERE %(node)s IN ('', name) ORDER BY name"""


class FleetNode(NamedTuple):
    """One node, as the fleet knows it."""

    name: str
    is_heard: bool
    """True if it has given a sign of life within its lease, by the database's clock."""
    silent_seconds: float
    """For how long it has not."""
    lease_seconds: float
    host: str
    pid: int
    path: str
    """Its state directory."""
    epoch: int
    """How often the node was claimed in the fleet."""
    revision: int
    """All its events up to this one are here."""
    is_whole: bool
    """True once all its records are here."""
    containers: int


_UNREAD = Status()
_NAMED = 10
"""So many nodes are named where there is none with a name that is asked for."""
_UNREADABLE = (
    Reason.DAMAGED,
    "what its node vouches for cannot be read in the fleet; the node writes it anew when its engine is opened again",
)


_OF_NODE = "container.node = %(node)s"
_NAMED_SO = "AND container.name = %(name)s"
_LABELLED = "AND labels_of(container.labels) @> labels_of(%(labels)s)"


class FleetContainer(NamedTuple):
    """One container of a node, as far as it is known here."""

    node: str
    id: str
    name: str
    sandbox_id: str
    labels: Mapping[str, str]
    checkpoint: Status
    """What the node has written last, of what has arrived."""
    status: Status
    """The same; Unknown if the node does not vouch for it, or is not heard of."""
    version: int


class FleetEvent(NamedTuple):
    """An event, and the node that it is of."""

    node: str
    event: Event


class _Known(NamedTuple):
    node: FleetNode
    doubts: Mapping[str, tuple[str, str]] | None
    """None if they cannot be read: then it vouches for nothing."""


class Fleet(ProcessBound):
    """The records of many nodes. It writes nothing. Threads may share it, and take turns.

    It may be kept open: a connection that was lost, or that an interrupt has left amid an answer, is made anew. In a
    fork it makes one of its own, and leaves the parent's alone.
    """

    def __init__(self, url: str) -> None:
        """Have the first question connect to the fleet's database. Raises InvalidInputError for what is no URL."""
        self._address = Address(url)
        self._connection: Connection | None = None
        self._closing = ExitStack()
        """Closes the connection."""
        self._has_labels_of = False
        """True if the database can look for labels; else all rows are read."""
        self._pid = os.getpid()
        self._turn = (self._pid, threading.RLock())
        """Held by who uses the connection; in a fork, whose parent may have held it, there is another one."""
        self._inherited: list[object] = []
        """What is the parent's, in a fork."""
        self._is_closed = False

    @classmethod
    def open(cls, url: str) -> Self:
        """Connect now, so that what is in the way is told. Raises InvalidInputError, FleetError."""
        fleet = cls(url)
        fleet._connect()
        return fleet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what is asked later raises ClosedError. May be repeated."""
        self._is_closed = True
        with self._in_turn():
            self._disconnect()

    @property
    def server(self) -> tuple[str, int]:
        """Where it is connected to: a host, or the directory of a socket; and the port."""
        with self._in_turn():
            info = self._connect().info
            return info.host, info.port

    def _in_turn(self) -> AbstractContextManager[object]:
        pid, turn = self._turn
        if pid != os.getpid():
            self._turn = (os.getpid(), turn := threading.RLock())
        return turn

    def _connect(self) -> Connection:
        """Return a connection that waits for a question: the one there is, if it does, or a new one."""
        if self._is_closed:
            raise ClosedError("the fleet is closed; open it again")
        connection = self._connection
        if connection is not None and self._pid == os.getpid() and _is_at_rest(connection):
            return connection
        self._disconnect()
        with ExitStack() as undo:
            connection = undo.enter_context(self._address.connect())
            require_current(self._address, connection)
            self._has_labels_of = has_labels_of(self._address, connection)
            self._closing = undo.pop_all()
        self._connection = connection
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        closing, self._closing = self._closing, ExitStack()
        if self._pid != os.getpid():
            self._inherited += [connection, closing]  # to close it would end the parent's session
            self._pid = os.getpid()
        elif connection is not None:
            connection.close()  # before, so that nothing is said on it, which may be amid an answer
            closing.close()

    def nodes(self, *, node: str = "") -> Sequence[FleetNode]:
        """Return all nodes, by name, or this one. Raises NotFoundError for a node that is none, FleetError."""
        return [known.node for known in self._choose_nodes(node, is_counted=True).values()]

    def list(
        self,
        *,
        node: str = "",
        labels: Mapping[str, str] | None = None,
        state: ContainerState | str | None = None,
        name: str = "",
    ) -> Sequence[FleetContainer]:
        """Return the containers of all nodes, or of one, that match all that is given, by node and id.

        `state` is the one that is told: of a node that is not heard of nothing is RUNNING. Raises NotFoundError for a
        node that is none, InvalidInputError for what cannot be looked for, such as a state that is none, FleetError.
        """
        wanted_state = None if state is None else read_state(state)
        _require_texts(name=name)
        if not isinstance(labels, Mapping | None):
            raise InvalidInputError(f"labels {quote(labels)}: give a mapping of texts")
        wanted = (labels or {}).items()
        texts = [text for label in wanted if (text := label_text(*label))]  # without those that nobody can have
        if texts:
            with self._in_turn():
                self._connect()
        clauses = f"{_NAMED_SO if name else ''} {_LABELLED if texts and self._has_labels_of else ''}"
        found = self._load(node, clauses, {"name": name, "labels": f"{{{','.join(texts)}}}"})
        if wanted:  # the last word has what was read: the index is of labels without NUL
            found = [one for one in found if wanted <= one.labels.items()]
        return found if wanted_state is None else [one for one in found if one.status.state is wanted_state]

    def get(self, container_id: str, *, node: str = "") -> FleetContainer:
        """Return the container with this id, on whatever node, or on this one.

        Else the one with this name, else the one whose id begins with it. Raises NotFoundError, AmbiguousError if
        several are meant, InvalidInputError, FleetError.
        """
        _require_texts(id=container_id)
        for clause in ("container.id = %(text)s", "container.name = %(text)s", "starts_with(container.id, %(text)s)"):
            found = self._load(node, f"AND {clause}", {"text": container_id}) if container_id else []
            if len(found) > 1:
                places = ", ".join(f"{one.id} on {one.node}" for one in found[:4])
                raise AmbiguousError(
                    f"{quote(container_id)} means {len(found)} containers: {places}; give an id and a node",
                    tuple(one.id for one in found[:4]),
                )
            if found:
                return found[0]
        raise NotFoundError(
            f"no container{f' of node {quote(node)}' if node else ' of any node'} has the id or the name"
            f" {quote(container_id)}, or an id that begins with it"
        )

    def metadata(self, container: FleetContainer) -> Metadata:
        """Return a container's metadata. Raises NotFoundError, StoreDamagedError, FleetError."""
        row = self._ask(
            f"SELECT {', '.join(ContainerRow._fields)} FROM container WHERE node = %s AND id = %s",  # noqa: S608  # ours
            (container.node, container.id),
        )
        if not row:
            raise NotFoundError(f"container {quote(container.id)} of node {quote(container.node)} does not exist")
        return row_to_metadata(container.node, from_record(ContainerRow, row[0]))

    def events(
        self, *, node: str = "", since: Mapping[str, int] | None = None, follow: bool = False
    ) -> Iterator[FleetEvent]:
        """Yield the events that are kept: of each node in their order, each once; with `follow` go on with what comes.

        `since` gives for a node the revision after which to begin; where a node is not in it, its oldest is the first.
        Raises NotFoundError for a node that is none, StoreDamagedError, FleetError.
        """
        for page in self.event_pages(node=node, since=since):
            yield from page
            if not page:
                if not follow:
                    return
                time.sleep(_POLL_SECONDS)

    def event_pages(
        self, *, node: str = "", since: Mapping[str, int] | None = None
    ) -> "Iterator[Sequence[FleetEvent]]":
        """Yield what `events` does, without an end: some of one node each time, and nothing after a look without news.

        Raises as `events` does.
        """
        _require_revisions(since)
        cursors = dict(since or {})
        columns = ", ".join(EventRow._fields)
        query = (
            f"SELECT {columns} FROM event WHERE node = %s AND revision > %s AND revision <= %s"  # noqa: S608
            " ORDER BY revision LIMIT %s"
        )
        while True:
            is_quiet = True
            for known in self._choose_nodes(node).values():
                # Only up to what was sent without a gap: a comparison of all rows sends older events last.
                key, until = known.node.name, known.node.revision
                rows = self._ask(query, (key, cursors.get(key, 0), until, _PAGE))
                if rows:
                    is_quiet = False
                    events = [row_to_event(key, from_record(EventRow, row)) for row in rows]
                    cursors[key] = events[-1].revision
                    yield [FleetEvent(key, event) for event in events]
            if is_quiet:
                yield ()

    def _ask(self, query: str, values: Any = None) -> "Sequence[tuple[Any, ...]]":
        return self._execute(query, values).fetchall()

    def _execute(self, query: str, values: Any = None) -> "psycopg.Cursor[Any]":
        if isinstance(values, dict):  # what somebody looks for is escaped as what was sent
            values = {key: escape(value) if isinstance(value, str) else value for key, value in values.items()}
        try:
            with self._in_turn(), self._address.errors_told():
                connection = self._connect()
                try:
                    return connection.execute(query, values)
                except psycopg.OperationalError:
                    if not connection.closed:
                        raise
                return self._connect().execute(query, values)  # it was lost while nothing was asked
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                f"{error.object!r} is no text that can be looked for: it has lone surrogates"
            ) from None

    def _load_nodes(self, node: str = "", *, is_counted: bool = False) -> dict[str, _Known]:
        _require_texts(node=node)
        found = {}
        for row in self._ask(_NODES, {"node": node, "is_counted": is_counted}):
            name, epoch, host, pid, path, _, revision, is_whole, doubts, lease, silent, containers = row
            known = FleetNode(
                name=name,
                is_heard=silent <= lease,
                silent_seconds=silent,
                lease_seconds=lease,
                host=host,
                pid=pid,
                path=path,
                epoch=epoch,
                revision=revision,
                is_whole=is_whole,
                containers=containers,
            )
            found[name] = _Known(known, _read_doubts(doubts))
        return found

    def _choose_nodes(self, node: str, *, is_counted: bool = False) -> dict[str, _Known]:
        nodes = self._load_nodes(node, is_counted=is_counted)
        if node and not nodes:
            names = list(self._load_nodes())
            more = f", and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            raise NotFoundError(
                f"the fleet knows no node {quote(node)}; it has: {', '.join(names[:_NAMED]) or 'none'}{more}"
            )
        return nodes

    def _load(self, node: str, clause: str, values: Mapping[str, object]) -> Sequence[FleetContainer]:
        _require_texts(node=node)
        names = ", ".join(f"container.{name}" for name in NameRow._fields)
        statuses = ", ".join(f"status.{name}" for name in StatusRow._fields)
        query = (
            f"SELECT container.node, {names}, {statuses} FROM container"  # noqa: S608  # our own names
            " LEFT JOIN container_status AS status USING (node, id)"
            f" WHERE {_OF_NODE if node else 'true'} {clause} ORDER BY container.node, container.id"
        )
        cursor = self._execute(query, {"node": node, **values})
        nodes = self._choose_nodes(node)  # after the rows: whether it is heard of is then not older than they are
        found: list[FleetContainer] = []
        while rows := cursor.fetchmany(_PAGE):  # all at once would have Python's garbage collector look at all of them
            for name, of_node in groupby(rows, key=itemgetter(0)):
                if name in nodes:
                    found += _make_containers(nodes[name], list(of_node))
        return found


def _require_texts(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, str):
            raise InvalidInputError(f"{name} {quote(value)}: give a text")


def _require_revisions(since: object) -> None:
    revisions = since.values() if isinstance(since, Mapping) else () if since is None else ("none",)
    if not all(isinstance(each, int) for each in revisions):
        raise InvalidInputError(f"since {quote(since)}: give a mapping of nodes' names to revisions")


def _is_at_rest(connection: Connection) -> bool:
    return not connection.closed and connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE


def _read_doubts(text: str) -> Mapping[str, tuple[str, str]] | None:
    try:
        return _doubts.decode(text)
    except msgspec.DecodeError:
        return None


def _make_containers(known: _Known, rows: Sequence[tuple[Any, ...]]) -> Iterator[FleetContainer]:
    """Yield the containers of one node, from rows of its name, a `NameRow` and a `StatusRow`."""
    statuses = [StatusRow._make(row[_WIDTH:]) for row in rows]
    for row, status, is_sound in zip(rows, statuses, are_sound(known.node.name, statuses), strict=True):
        yield _make_container(known, from_record(NameRow, row[1:_WIDTH]), status, is_sound=is_sound)


def _make_container(known: _Known, names: NameRow, row: StatusRow, *, is_sound: bool) -> FleetContainer:
    node = known.node
    checkpoint, doubt = _UNREAD, (known.doubts or {}).get(names.id)
    try:
        if not is_sound:  # few have anything escaped, which does not match its checksum
            row = from_record(StatusRow, row)
            require_readable_status(node.name, row)
        checkpoint = row_to_status(row)
    except StoreDamagedError as error:
        doubt = (Reason.DAMAGED, str(error))
    status = checkpoint
    if not node.is_heard and not checkpoint.finished_at:
        was = {ContainerState.RUNNING: "running", ContainerState.CREATED: "created"}.get(
            checkpoint.state, "to be created"
        )
        doubt = (Reason.NOT_HEARD_OF, f"was {was}, not heard of for {node.silent_seconds:.0f} s")
    elif doubt is None and known.doubts is None and not checkpoint.finished_at:
        doubt = _UNREADABLE
    if doubt is not None:
        status = replace(checkpoint, reason=doubt[0], message=doubt[1], unknown=True)
    return FleetContainer(
        node=node.name,
        id=names.id,
        name=names.name,
        sandbox_id=names.sandbox_id,
        labels=read_labels(names.labels),
        checkpoint=checkpoint,
        status=status,
        version=row.seq or 0,
    )
