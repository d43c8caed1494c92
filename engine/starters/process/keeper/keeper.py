"""The keeper: it forks gates, sees what ends, writes that down, and only then reaps.

One thread, one epoll set. What goes wrong with one request or one container is answered or tried again; it never ends
the loop. An end waits for its engine to write it down; where no engine is there, or it takes too long, the keeper
flushes its own journal first. While neither can be done, zombies are left, and nothing is forgotten.
"""

import gc
import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from .adoption import find_again, hold_uts_of_left, settle_executed
from .connections import Answer, Connections
from .container import Container
from .copies import Copies
from .ends import Ends
from .journal import Journal, Record
from .kernel import (
    close,
    close_all,
    has_ended,
    have_go_on,
    hold_uts_namespace,
    kill,
    kill_own,
    let_go_on,
    open_null,
    read_stat,
)
from .loop import Loop
from .members import Members
from .messages import LONGEST, VERSION, Message, divide, encode, read_peer, send
from .root import read_view
from .starts import Starts

_TICK_SECONDS = 0.5
_LONGEST_SLEEP_SECONDS = 5.0
_QUIET_SECONDS = 0.002
"""How long nothing may have happened before a start is looked at and a gate forked ahead: right after a start, the
start's own program and whoever waits for it need the processors."""
_OPENED_SECONDS = 0.02
"""How long it may take at most until it is looked at whether a program was executed."""
_IDLE_SECONDS = 2.0
"""How long the keeper stays when nothing is left for it, and the spare gate when there is no container.

Once it was sent SIGTERM, it does not stay."""
_REAP_SECONDS = 0.1
"""Between two looks for orphans to reap: with many containers each takes a while, and each end asks for one."""
_LOOK_SECONDS = 1.0
"""Between two looks whether the processes of our own were stopped."""
_PAGE = 100
_MOST_MEMBERS = 5_000
"""Pids in one message."""
_FOR_MANY = {"end", "signal", "release"}
"""What may be asked of many containers at once."""
_AT_ONCE = 8
"""How many of them share a look at the orphans: none is older then when the last of them is signalled than it must."""
_TURN_SECONDS = 0.05
"""After so long no more of many are answered: others wait."""
_MOST_BYTES = LONGEST // 2
"""Of what is told of several containers; one alone has room in any case."""


class Keeper:
    """The keeper of the directory behind a descriptor."""

    def __init__(self, directory: int, listener: socket.socket, anchor: int, copies: Copies) -> None:
        self._directory = directory
        self._anchor = anchor
        self._loop = Loop()
        self._connections = Connections(directory, listener, self._loop, self._answer, self._close_gates_of)
        self._containers: dict[str, Container] = {}
        self._firsts: dict[int, Container] = {}  # by the pid of the first process, until that is reaped
        self._members = Members(self._firsts, self._list_ours)
        self._unadopted: dict[str, Record] = {}  # of another keeper, and not looked at yet
        self._child_has_changed = self._may_be_stopped = True
        self._reap_again_at = 0.0
        self._look_again_at = 0.0
        self._idle_since = time.monotonic()
        self._is_told_to_end = False
        self._copies = copies
        self._namespace = os.stat("/proc/self/ns/pid").st_ino
        self._view = read_view()
        self._journal = Journal(directory, f"{_read_boot_id()}/{self._namespace}")
        self._ends = Ends(self._loop, self._journal, self._containers, self._firsts, self._members)
        self._starts = Starts(
            self._loop, self._journal, copies, self._containers, self._firsts, self._connections.send, self._note_end
        )
        self._loop.watch_children(self._note_children)
        signal.signal(signal.SIGTERM, self._be_told_to_end)
        copies.watch(self._loop.watch, self._loop.unwatch)
        self._unadopted = self._journal.load()
        copies.sweep(self._unadopted)
        self._adopt_all()
        gc.collect()
        gc.freeze()
        gc.disable()  # there are no circles; a fork copies no page that a collection wrote to

    def run(self) -> None:
        """Serve until nothing is left to do."""
        while not self._may_end():
            patience = self._patience()
            waits_for_quiet = self._starts.can_be_furthered and patience >= _QUIET_SECONDS
            ready = self._loop.wait(_QUIET_SECONDS if waits_for_quiet else patience)
            if not ready and waits_for_quiet:
                self._be_quiet()
            self._members.look_anew()
            self._loop.serve(ready)
            with suppress(Exception):
                self._tick()
        self._starts.give_up_spare()
        self._end_ours()

    def _end_ours(self) -> None:
        """End what ends with us: if it is stopped just now it does not see that we do, and nobody else continues it."""
        for pid in list(self._find_ours()):
            with suppress(OSError):
                if pid == self._anchor or (pid == self._copies.pid and self._copies.are_open):
                    have_go_on(pid)
                else:
                    kill_own(pid)

    def _be_quiet(self) -> None:
        """Do what can wait until nobody has asked for anything for a moment."""
        with suppress(Exception):
            self._starts.settle_opened()
        if self._starts.wants_spare:
            self._starts.spare.make()
            with suppress(Exception):
                self._rehearse()

    def _rehearse(self) -> None:
        """Go through parts of a start: since the fork each page is copied when it is first written to.

        Nobody waits for that now, and the keeper's part of the next start takes a third less.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            for op in ("hello", "end"):
                send(theirs, {"op": op, "id": ""}, (theirs.fileno(), theirs.fileno()))
                self._connections.serve(ours)
            self._loop.watch(ours.fileno(), lambda: None)
            self._loop.unwatch(ours.fileno())
            close_all(open_null())
        read_stat(self._starts.spare.pid)
        encode(Container("", self._starts.spare.pid, 0, -1, None).describe())

    # The loop's turns

    def _note_children(self) -> None:
        self._child_has_changed = self._may_be_stopped = True

    def _patience(self) -> float:
        """Return how many seconds to sleep at most. A disk that is slow or refuses is asked at each tick only."""
        until_flush = self._ends.seconds_to_flush()
        if until_flush is not None:
            return min(until_flush, _TICK_SECONDS)
        if self._child_has_changed:
            return min(max(0.0, self._reap_again_at - time.monotonic()), _TICK_SECONDS)
        has_work = (
            self._ends.are_pending
            or self._unadopted
            or self._starts.has_undone
            or not self._journal.is_written
            or self._copies.need_care
            or self._may_be_stopped
            or (self._starts.spare.pid and not self._containers)
        )
        return _TICK_SECONDS if has_work or not self._connections else _LONGEST_SLEEP_SECONDS

    def _may_end(self) -> bool:
        try:
            return self._is_idle()
        except OSError:  # what is left cannot be seen now
            return False

    def _is_idle(self) -> bool:
        busy = self._connections or self._firsts or self._ends.flusher or self._unadopted or self._has_leftovers()
        has_debts = self._copies.are_open or not self._journal.is_written
        if busy or (has_debts and os.fstat(self._directory).st_nlink):  # the directory is removed: nobody can ask
            self._idle_since = time.monotonic()
            return False
        return self._is_told_to_end or time.monotonic() - self._idle_since > _IDLE_SECONDS

    def _be_told_to_end(self, *_: object) -> None:
        self._is_told_to_end = True

    def _has_leftovers(self) -> bool:
        """Say whether anything is left of a container that has ended."""
        return bool(self._members.orphans().pids)

    def _tick(self) -> None:
        self._let_ours_go_on()
        with suppress(OSError):
            self._connections.listen_again()
        self._adopt_all()
        with suppress(OSError):
            self._starts.settle_opened(_OPENED_SECONDS)
        self._starts.do_again()
        with suppress(OSError):
            if self._child_has_changed and time.monotonic() >= self._reap_again_at:
                self._starts.spare.reap()
                self._members.reap_orphans()
                self._child_has_changed = False
                self._reap_again_at = time.monotonic() + _REAP_SECONDS
        for container in self._ends.unreadable:
            with suppress(OSError):
                self._note_end(container)
        with suppress(OSError):
            self._ends.look_for_left()
        self._journal.write()
        with suppress(OSError):
            self._ends.flush()
        with suppress(OSError):
            self._copies.care()
        if not self._containers:
            self._starts.give_up_spare(_IDLE_SECONDS)

    def _let_ours_go_on(self) -> None:
        """Continue what works for us and was stopped, by a container of root's or by a person: nobody else would."""
        now = time.monotonic()
        if now < self._look_again_at:
            return
        self._look_again_at = now + _LOOK_SECONDS
        self._may_be_stopped = False
        for pid in self._find_ours():
            with suppress(OSError):
                let_go_on(pid)

    def _find_ours(self) -> Iterator[int]:
        """Yield the processes that work for us, gates included."""
        anchor = self._anchor if self._anchor == os.getppid() else 0  # it lives, and is not we
        known = (anchor, self._copies.pid, self._ends.flusher, *self._starts.gates)
        yield from filter(None, known)
        with suppress(OSError):
            yield from self._members.helpers()

    # Requests

    def _answer(self, connection: socket.socket, request: Message, descriptors: list[int]) -> Answer:
        self._starts.settle_asked(connection, request)
        match request["op"]:
            case "hello":
                answer = {"version": VERSION, "pid": os.getpid(), "anchor": self._anchor, "view": self._view}
                return answer | {"pid_namespace": self._namespace}, ()
            case "prepare":
                self._prepare(connection, request, descriptors)
                return None, ()
            case "list":
                return self._list(request["after"]), ()
            case "ack":
                self._acknowledge(request["ids"])
                return None, ()
        if request["op"] in _FOR_MANY:
            return self._answer_for_many(request, read_peer(connection)[0]), ()
        known = self._find(request)
        return (known if isinstance(known, dict) else self._answer_of(connection, request, known)), ()

    def _find(self, request: Message) -> Container | Message:
        """Return the container that a request is about, or what is answered if there is none."""
        key = request["id"]
        known = self._containers.get(key)
        if key in self._unadopted:
            return {"error": f"container {key} cannot be looked at yet"}
        if known is None or not _is_meant(request, known):
            if request["op"] == "release":
                self._copies.give_up(key)
            return {"unknown": True, "copying": self._copies.is_copying(key)}
        return known

    def _answer_of(self, connection: socket.socket, request: Message, container: Container) -> Message | None:
        """Return what is answered to a request about one container."""
        match request["op"]:
            case "go":
                return self._starts.go(connection, container)
            case "members":
                members = self._members.find_but(container, read_peer(connection)[0])
                return {"members": members[:_MOST_MEMBERS], "all": len(members) <= _MOST_MEMBERS}
            case "reopen":
                self._copies.reopen(container.id)
                return {}
        return {"error": f"version {VERSION} of the keeper does not know {request['op']!r}"}

    def _answer_for_many(self, request: Message, asker: int) -> Message:
        """Answer a request about one container, or about many: as many as there is time and room for."""
        if "many" not in request:
            return self._answer_each([request], asker)[0]
        requests = divide(request)
        answers: list[Message] = []
        until = time.monotonic() + _TURN_SECONDS
        while len(answers) < len(requests) and time.monotonic() < until:
            try:
                answers += self._answer_each(requests[len(answers) : len(answers) + _AT_ONCE], asker)
            except OSError:  # something cannot be looked at now: what is done is told, and the rest asked for again
                if answers:
                    break
                raise
        return {"answers": _fit(answers)}

    def _answer_each(self, requests: Sequence[Message], asker: int) -> list[Message]:
        """Answer requests that differ in the container alone. `asker` is who asks: it is never signalled."""
        found = [self._find(each) for each in requests]
        containers = [each for each in found if isinstance(each, Container)]
        match requests[0]["op"]:
            case "end":
                answers = self._tell_ends(containers)
            case "signal":
                left = self._members.signal(containers, requests[0]["number"], asker, requests[0].get("session", False))
                answers = {key: {"left": number} for key, number in left.items()}
            case _:
                answers = self._release(containers, asker)
        return [each if isinstance(each, dict) else answers[each.id] for each in found]

    def _close_gates_of(self, connection: socket.socket) -> None:
        """End what a connection that was closed held at a gate."""
        for container in list(self._firsts.values()):
            if container.waiting is connection:
                container.waiting = None
            if container.owner is connection:
                self._starts.close_gate(container)
                kill(container.pidfd, signal.SIGKILL)  # it may be stopped, and never see its gate close

    def _prepare(self, connection: socket.socket, request: Message, descriptors: list[int]) -> None:
        """Begin a start, unless the container has a process; what is known of one that has ended is forgotten."""
        before = self._containers.get(request["id"])
        if before is not None:
            self._tell_ends([before])
            if before.end is None:
                raise FileExistsError(f"container {before.id} has process {before.pid}")
            self._forget(before)
        self._is_told_to_end = False
        if connection.fileno() >= 0:  # else it was left as it could not be told of the start before: who asks is gone
            self._starts.prepare(connection, request, descriptors)

    # An end

    def _note_end(self, container: Container) -> None:
        if container.end is not None or container.pidfd < 0:
            return
        if container.report >= 0:
            self._starts.read_report(container)  # its writers are dead: this reads to the end
        self._starts.close_gate(container)
        if self._ends.note(container, engine_is_there=bool(self._connections)):
            self._starts.tell_who_waits(container)

    def _tell_ends(self, containers: Sequence[Container]) -> dict[str, Message]:
        for container in containers:
            if container.end is None and container.pidfd >= 0 and has_ended(container.pidfd):
                self._note_end(container)  # its engine has seen it before us
        with suppress(OSError):
            self._ends.look_for_left()
        return {each.id: self._tell_end(each) for each in containers}

    def _tell_end(self, container: Container) -> Message:
        if not container.end:
            return container.describe() | {"running": True}
        return container.describe() | {"empty": container.is_empty, "copying": self._copies.is_copying(container.id)}

    def _acknowledge(self, keys: Iterable[str]) -> None:
        """Reap containers whose ends their engine has written down; they need not be kept any longer."""
        for container in self._ends.acknowledge(keys):
            self._drop(container.id)
        if not self._unadopted:  # of these the journal alone knows
            self._ends.rewrite_journal()

    # What is left of it

    def _list_ours(self) -> set[int]:
        """Return the pids of our children that are of our own making, and of those that are to be looked at yet."""
        ours = {self._copies.pid, self._starts.spare.pid, self._ends.flusher}
        return ours.union(record.get("pid", 0) for record in self._unadopted.values())

    def _release(self, containers: Sequence[Container], but_not: int) -> dict[str, Message]:
        left = self._members.signal(containers, signal.SIGKILL, but_not)
        gone = [each for each in containers if not left[each.id]]
        for container in gone:
            self._copies.give_up(container.id)  # that its end is written down may be told later
        over = [each for each in gone if each.is_acknowledged or each.executed is False]
        if not all(each.is_empty for each in over):
            self._members.reap_orphans()
        for container in over:
            self._forget(container)
        return {key: {"left": number, "copying": self._copies.is_copying(key)} for key, number in left.items()}

    def _forget(self, container: Container) -> None:
        self._journal.append({"id": container.id, "forgotten": True})
        if container.end is not None:
            self._ends.reap(container)
        self._drop(container.id)

    def _drop(self, key: str) -> None:
        """Give up all that is held for a container."""
        container = self._containers.pop(key, None)
        if container is None:
            return
        self._ends.drop(container)
        self._starts.drop(container)
        self._firsts.pop(container.pid, None)
        for descriptor in (container.pidfd, container.uts):
            if descriptor >= 0:
                self._loop.unwatch(descriptor)
                close(descriptor)
        container.pidfd = container.uts = -1

    # After another keeper's death

    def _adopt_all(self) -> None:
        """Take over what the keeper before us knew; what cannot be looked at now is tried again at the next tick."""
        for key in list(self._unadopted):
            with suppress(OSError):
                self._adopt(self._unadopted[key])
                del self._unadopted[key]

    def _adopt(self, record: Record) -> None:
        """Take over a container: ours by reparenting if we were the anchor, otherwise known by its pidfd alone.

        What it has left is ours then, too; in the other case it is nobody's to be known.

        Raises OSError if it cannot be looked at now; nothing has been done then.
        """
        key, pid, start_ticks = record["id"], record.get("pid", 0), record.get("start", 0)
        container = Container(key, pid, start_ticks, -1, record.get("log"))
        container.inode, container.uts_inode = record.get("inode", 0), record.get("uts") or 0
        container.executed = record.get("executed")
        container.why = (record.get("why") or "").encode()
        container.end, container.is_acknowledged = record.get("end"), bool(record.get("acknowledged"))
        try:
            if not find_again(container, self._loop.anonymous) or not settle_executed(container):
                self._adopt_ended(container)
                return
            if container.is_proven:
                container.uts = hold_uts_namespace(pid)
                if container.uts < 0:  # it has ended
                    container.uts = hold_uts_of_left(container, self._members)
            if container.log:
                self._copies.begin_again(key, container.log)
            if container.end is None:
                self._loop.watch(container.pidfd, lambda: self._note_end(container))
        except BaseException:
            close_all({container.pidfd, container.uts} - {-1})
            raise
        if record.get("executed") is None:
            self._journal.append({"id": key, "executed": container.executed})
        self._containers[key] = self._firsts[pid] = container
        if container.end is not None:
            self._ends.note_known(container)

    def _adopt_ended(self, container: Container) -> None:
        container.uts = hold_uts_of_left(container, self._members)
        if container.is_acknowledged and container.uts < 0:
            self._journal.append({"id": container.id, "forgotten": True})
            return
        if container.log:
            self._copies.begin_again(container.id, container.log)
        self._containers[container.id] = container
        container.is_reaped = True
        if container.end is None or container.executed is None:
            # Nobody knows. "Never ran" is not said of what may have run, nor is a code that may be its gate's; of what
            # was seen at its gate, and its end was not, it is.
            container.end = {"unseen": True, "time": (container.end or {}).get("time") or time.time_ns()}
            container.executed = container.executed is not False
            self._journal.append({"id": container.id, "end": container.end})

    def _list(self, after: str) -> Message:
        keys = sorted(key for key in self._containers if key > after)
        told = _fit([self._containers[key].describe() for key in keys[:_PAGE]])
        return {"containers": told, "more": len(keys) > len(told)}


def _fit(records: Sequence[Message]) -> Sequence[Message]:
    """Return as many as a message has room for, one at least."""
    room = _MOST_BYTES
    for number, record in enumerate(records):
        room -= len(encode(record))
        if number and room < 0:
            return records[:number]
    return records


def _is_meant(request: Message, container: Container) -> bool:
    """Say whether a request means this container: one that names a process may mean another that had its id."""
    return "pid" not in request or (request["pid"], request["start"]) == (container.pid, container.start_ticks)


def _read_boot_id() -> str:
    """Return the boot id. Raises OSError: without it the ends of another boot could be taken for those of this one."""
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return file.read().strip()
