"""The keeper's loop: it forks gates, sees what ends, writes that down, and only then reaps.

One thread, one epoll set. What goes wrong with one request or one container is answered or tried again; it never ends
the loop. An end waits for its engine to write it down; where no engine is there, or it takes too long, the keeper
flushes its own journal first. While neither can be done, zombies are left, and nothing is forgotten.
"""

import errno
import gc
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from .container import Container, Orphans
from .copies import Copies
from .journal import Journal, Record
from .kernel import (
    close,
    has_ended,
    hold_uts_namespace,
    let_go_on,
    list_processes,
    read_children,
    read_exit_of_stranger,
    read_stat,
    read_stat_of,
)
from .messages import LONGEST, VERSION, Message, encode, read_peer, receive, send
from .spare import Spare, hand_over

_ENGINE_TAKES_SECONDS = 0.2
"""How long an end waits for a connected engine before the keeper flushes it."""
_TICK_SECONDS = 0.5
_LONGEST_SLEEP_SECONDS = 5.0
_QUIET_SECONDS = 0.002
"""How long nothing may have happened before a start is looked at and a gate forked ahead: right after a start, the
start's own program and whoever waits for it need the processors."""
_OPENED_SECONDS = 0.02
"""How long it may take at most until it is looked at whether a program was executed."""
_IDLE_SECONDS = 2.0
"""How long the keeper stays when nothing is left for it, and the spare gate when there is no container."""
_UNSEEN_SECONDS = 10.0
"""How long a process that is not our child may take to be reaped by its parent."""
_REAP_SECONDS = 0.1
"""Between two looks for orphans to reap: with many containers each takes a while, and each end asks for one."""
_LOOK_SECONDS = 1.0
"""Between two looks whether the processes of our own were stopped."""
_END_SECONDS = 1.0
"""How long one that was killed may take to end before we go on."""
_NO_PROCESS = {errno.ESRCH, errno.EINVAL, errno.ENOENT}
"""What pidfd_open(2) says of a number that is no process's: nobody's, 0, or a thread's."""
_PAGE = 100
_MOST_MEMBERS = 5_000
"""Pids in one message."""
_WITHOUT_ANSWER = {"ack"}
_FOR_MANY = {"end", "signal", "release"}
"""What may be asked of many containers at once."""
_AT_ONCE = 8
"""How many of them share a look at the orphans: none is older then when the last of them is signalled than it must."""
_TURN_SECONDS = 0.05
"""After so long no more of many are answered: others wait."""
_MOST_BYTES = LONGEST // 2
"""Of what is told of several containers; one alone has room in any case."""
_ROUNDS_OF_SIGKILL = 5
_MORE_LOOKS = 9


class Keeper:
    """The keeper of the directory behind a descriptor."""

    def __init__(self, directory: int, listener: socket.socket, anchor: int, copies: Copies) -> None:
        self._directory = directory
        self._listener = listener
        self._anchor = anchor
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._clients: dict[int, socket.socket] = {}
        self._peers: dict[int, int] = {}  # a pidfd of who has connected, by the connection's descriptor
        self._containers: dict[str, Container] = {}
        self._firsts: dict[int, Container] = {}  # by the pid of the first process, until that is reaped
        self._starting: set[str] = set()  # containers whose start is not over
        self._opened: dict[str, float] = {}  # whose gates were opened, and when: what came of it is looked at later
        self._spare = Spare()
        self._last_start = 0.0
        self._ended: dict[str, float] = {}  # ended and not reaped: when to flush, in seconds of the monotonic clock
        self._unheld: dict[str, Container] = {}  # executed, and its UTS namespace not looked at yet
        self._unadopted: dict[str, Record] = {}  # of another keeper, and not looked at yet
        self._unreadable: dict[str, float] = {}  # ended, and its code not to be had yet: until when to ask
        self._flush_again_at = 0.0  # not before: a disk that refuses is not asked without end
        self._flushing: tuple[int, list[Container]] | None = None
        self._just_ended: list[Container] = []  # of these it is not known yet whether anything is left
        self._child_has_changed = True
        self._reap_again_at = 0.0
        self._look_again_at = 0.0
        self._orphans_now: Orphans | None = None  # read since the loop was woken: all that ended before is in it
        self._idle_since = time.monotonic()
        self._copies = copies
        self._namespace = os.stat("/proc/self/ns/pid").st_ino
        self._anonymous = os.fstat(self._poll.fileno())
        self._journal = Journal(directory, f"{_read_boot_id()}/{self._namespace}")
        self._watch(listener.fileno(), self._accept)
        self._watch_children()
        copies.watch(self._watch, self._unwatch)
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
            waits_for_quiet = bool(self._opened or self._wants_spare) and patience >= _QUIET_SECONDS
            ready = self._poll.poll(_QUIET_SECONDS if waits_for_quiet else patience)
            if not ready and waits_for_quiet:
                self._be_quiet()
            self._orphans_now = None
            # As it was when that was told: a handler before may have closed it, and its number be another's by now.
            for descriptor, handler in [(each, self._handlers.get(each)) for each, _ in ready]:
                if handler is not None and self._handlers.get(descriptor) is handler:
                    with suppress(Exception):  # one that cannot be served now; the next tick looks at all again
                        handler()
            with suppress(Exception):
                self._tick()
        self._spare.give_up()

    def _be_quiet(self) -> None:
        """Do what can wait until nobody has asked for anything for a moment."""
        with suppress(Exception):
            self._settle_opened()
        if self._wants_spare:
            self._spare.make()
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
                self._serve(ours)
            self._watch(ours.fileno(), lambda: None)
            self._unwatch(ours.fileno())
            _close_all(_open_null())
        read_stat(self._spare.pid)
        encode(Container("", self._spare.pid, 0, -1, None).describe())

    @property
    def _wants_spare(self) -> bool:
        """Say whether to fork a gate ahead."""
        return self._spare.is_wanted and not self._starting

    # The loop's parts

    def _watch(self, descriptor: int, handler: Callable[[], None]) -> None:
        self._handlers[descriptor] = handler
        try:
            self._poll.register(descriptor, select.EPOLLIN)
        except OSError:
            del self._handlers[descriptor]
            raise

    def _unwatch(self, descriptor: int) -> None:
        if self._handlers.pop(descriptor, None) is not None:
            with suppress(OSError):  # it goes with the descriptor in any case
                self._poll.unregister(descriptor)

    def _watch_children(self) -> None:
        """Be woken by SIGCHLD: daemons that came to us have to be reaped when they end."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.siginterrupt(signal.SIGCHLD, False)  # no call is cut short by it

        def notice() -> None:
            self._child_has_changed = True
            _drain(read)

        self._watch(read, notice)

    def _patience(self) -> float:
        """Return how many seconds to sleep at most. A disk that is slow or refuses is asked at each tick only."""
        now = time.monotonic()
        if self._ended and self._journal.is_written and self._flushing is None and now >= self._flush_again_at:
            return min(max(0.0, min(self._ended.values()) - now), _TICK_SECONDS)
        if self._child_has_changed:
            return min(max(0.0, self._reap_again_at - now), _TICK_SECONDS)
        has_work = (
            self._ended
            or self._unreadable
            or self._unadopted
            or self._unheld
            or not self._journal.is_written
            or self._copies.need_care
            or (self._spare.pid and not self._containers)
        )
        return _TICK_SECONDS if has_work or not self._clients else _LONGEST_SLEEP_SECONDS

    def _may_end(self) -> bool:
        try:
            return self._is_idle()
        except OSError:  # what is left cannot be seen now
            return False

    def _is_idle(self) -> bool:
        busy = self._clients or self._firsts or self._flushing or self._unadopted or self._has_leftovers()
        has_debts = self._copies.are_open or not self._journal.is_written
        if busy or (has_debts and os.fstat(self._directory).st_nlink):  # the directory is removed: nobody can ask
            self._idle_since = time.monotonic()
        return time.monotonic() - self._idle_since > _IDLE_SECONDS

    def _has_leftovers(self) -> bool:
        """Say whether anything is left of a container that has ended."""
        return not all(map(_works_for_us, self._orphans().pids))

    def _tick(self) -> None:
        self._let_ours_go_on()
        self._adopt_all()
        with suppress(OSError):
            self._settle_opened(_OPENED_SECONDS)
        for container in list(self._unheld.values()):
            self._hold_uts(container)
            self._journal.append({"id": container.id, "uts": container.uts_inode})
        with suppress(OSError):
            if self._child_has_changed and time.monotonic() >= self._reap_again_at:
                self._reap_orphans()
                self._child_has_changed = False
                self._reap_again_at = time.monotonic() + _REAP_SECONDS
        for key in list(self._unreadable):
            with suppress(OSError):
                self._note_end(self._containers[key])
        with suppress(OSError):
            self._look_after_ends()
        self._journal.write()
        with suppress(OSError):
            self._flush()
        with suppress(OSError):
            self._copies.care()
        if self._spare.pid and not self._containers and time.monotonic() - self._last_start > _IDLE_SECONDS:
            self._spare.give_up()

    def _let_ours_go_on(self) -> None:
        """Continue what works for us and was stopped, by a container of root's or by a person: nobody else would."""
        now = time.monotonic()
        if now < self._look_again_at:
            return
        self._look_again_at = now + _LOOK_SECONDS
        anchor = self._anchor if self._anchor == os.getppid() else 0  # it lives, and is not we
        ours = [anchor, self._copies.pid, self._flushing[0] if self._flushing else 0]
        with suppress(OSError):
            ours += [pid for pid in self._orphans().pids if _works_for_us(pid)]
        for pid in filter(None, ours):
            with suppress(OSError):
                let_go_on(pid)

    # Requests

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        with suppress(OSError):
            pid, uid = read_peer(connection)
            if uid == os.geteuid():
                connection.setblocking(False)
                self._watch(connection.fileno(), lambda: self._serve(connection))
                self._clients[connection.fileno()] = connection
                self._watch_peer(connection, pid)
                return
        connection.close()

    def _watch_peer(self, connection: socket.socket, pid: int) -> None:
        """Leave with the process that connected: a fork of it may hold the connection for longer."""
        with suppress(OSError, ValueError):  # one of another pid namespace has no number here
            pidfd = os.pidfd_open(pid)
            try:
                self._watch(pidfd, lambda: self._leave(connection))
            except BaseException:
                close(pidfd)
                raise
            self._peers[connection.fileno()] = pidfd

    def _serve(self, connection: socket.socket) -> None:
        try:
            request, descriptors = receive(connection)
        except BlockingIOError:
            return
        except ValueError as error:
            self._refuse(connection, error)
            return
        try:
            if request is None:
                self._leave(connection)
                return
            self._settle_starts(connection, request)
            answer, given = self._answer(connection, request, descriptors)
        except Exception as error:  # noqa: BLE001  # a request that makes no sense is answered, and ends nothing
            if request is None or request.get("op") not in _WITHOUT_ANSWER:
                self._refuse(connection, error)
            return
        finally:
            _close_all(descriptors)
        if answer is not None:
            self._send(connection, answer, given)

    def _settle_starts(self, connection: socket.socket, request: Message) -> None:
        """Take note of a program that was executed before this request was made: its engine sees that as soon as we."""
        keys = {each.get("id") for each in _divide(request)} if self._starting else ()
        for container in [self._containers[each] for each in self._starting]:
            if container.waiting is connection or (container.id in keys and container.gate < 0):
                self._read_report(container)

    def _refuse(self, connection: socket.socket, error: Exception) -> None:
        self._send(connection, {"error": f"{type(error).__name__}: {error}"})

    def _send(self, connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send an answer. Where it cannot be sent the connection is closed: who waits for it asks again."""
        try:
            send(connection, message, descriptors)
        except OSError:
            if connection.fileno() in self._clients:
                self._leave(connection)

    def _answer(
        self, connection: socket.socket, request: Message, descriptors: list[int]
    ) -> tuple[Message | None, Sequence[int]]:
        """Return what is answered, None for nothing yet or at all, and the descriptors that go with it."""
        match request["op"]:
            case "hello":
                answer = {"version": VERSION, "pid": os.getpid(), "anchor": self._anchor}
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
                return self._go(connection, container)
            case "members":
                members = self._members_but(container, read_peer(connection)[0])
                return {"members": members[:_MOST_MEMBERS], "all": len(members) <= _MOST_MEMBERS}
            case "reopen":
                self._copies.reopen(container.id)
                return {}
        return {"error": f"version {VERSION} of the keeper does not know {request['op']!r}"}

    def _answer_for_many(self, request: Message, asker: int) -> Message:
        """Answer a request about one container, or about many: as many as there is time and room for."""
        if "many" not in request:
            return self._answer_each([request], asker)[0]
        requests = _divide(request)
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
                left = self._signal(containers, requests[0]["number"], asker, requests[0].get("session", False))
                answers = {key: {"left": number} for key, number in left.items()}
            case _:
                answers = self._release(containers, asker)
        return [each if isinstance(each, dict) else answers[each.id] for each in found]

    def _leave(self, connection: socket.socket) -> None:
        """Close a connection, whose engine is gone or has given up a call: what it held at a gate ends."""
        self._unwatch(connection.fileno())
        del self._clients[connection.fileno()]
        peer = self._peers.pop(connection.fileno(), -1)
        if peer >= 0:
            self._unwatch(peer)
            close(peer)
        connection.close()
        for container in list(self._firsts.values()):
            if container.waiting is connection:
                container.waiting = None
            if container.owner is connection:
                self._close_gate(container)
                _kill(container.pidfd, signal.SIGKILL)  # it may be stopped, and never see its gate close

    # A start

    def _prepare(self, connection: socket.socket, request: Message, descriptors: list[int]) -> None:
        """Give a container a gate, and answer. It is held until `go`; whatever fails, no process is left."""
        key = request["id"]
        before = self._containers.get(key)
        if before is not None:
            self._tell_ends([before])
            if before.end is None:
                raise FileExistsError(f"container {key} has process {before.pid}")
            self._forget(before)
        self._last_start = time.monotonic()
        plan, *log_directory = descriptors
        opened: list[int] = []
        log = request.get("log")
        try:
            try:
                streams = self._copies.make(key, log, request.get("owner", -1)) if log else _open_null()
                opened += streams
                if log:
                    self._copies.begin(key, log, log_directory)
                report, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                opened.append(theirs)
                container = self._enter(key, report, log)
            except BaseException:
                self._copies.discard(key)
                raise
            container.owner, container.is_report_given = connection, bool(request.get("report"))
            self._journal.append(container.describe())
            # Before it is handed over: a gate that is woken takes the processor from us, while the engine waits.
            given = (container.pidfd, *([container.report] if container.is_report_given else []))
            self._send(connection, {"pid": container.pid}, given)
            self._hand_over(container, (plan, *opened))
        finally:
            _close_all(opened)

    def _enter(self, key: str, report: int, log: Record | None) -> Container:
        """Take a gate and watch it: it is a container's from now on. `report` is closed if that fails."""
        gate = None
        try:
            gate = self._spare.take()
            container = Container(key, gate.pid, gate.start_ticks, gate.pidfd, log)
            container.inode = self._read_inode(gate.pidfd)
            self._watch(gate.pidfd, lambda: self._note_end(container))
        except BaseException:
            if gate is not None:
                gate.end()
            close(report)
            raise
        container.gate, container.report = gate.control, report
        self._containers[key] = self._firsts[gate.pid] = container
        self._starting.add(key)
        return container

    def _hand_over(self, container: Container, descriptors: Sequence[int]) -> None:
        """Give the gate what it is to become; where that fails it ends, and says why in its place."""
        try:
            hand_over(container.gate, descriptors)
            self._watch(container.gate, lambda: self._note_ready(container))
            with suppress(OSError):
                let_go_on(container.pid)
        except Exception as error:  # noqa: BLE001  # it is answered already
            reason = getattr(error, "strerror", None) or error
            container.why = f"its gate could not be told what it is to become: {reason}".encode()
            _kill(container.pidfd, signal.SIGKILL)

    def _go(self, connection: socket.socket, container: Container) -> Message | None:
        """Open the gate once it is ready; the answer comes once the program is executed, or is not."""
        if container.gate < 0:
            return self._tell_start(container)
        container.waiting, container.owner, container.is_wanted = connection, None, True
        if container.is_ready:
            self._open_gate(container)
        return None

    def _note_ready(self, container: Container) -> None:
        """Hold the UTS namespace that the gate has entered: by it the daemons are told of a program that ends at once.

        So it comes before the gate is opened; mostly the engine is writing down meanwhile that the container runs.
        """
        self._unwatch(container.gate)
        self._hold_uts(container)
        if container.uts_inode:
            self._journal.append({"id": container.id, "uts": container.uts_inode})
        container.is_ready = True
        if container.is_wanted:
            self._open_gate(container)

    def _open_gate(self, container: Container) -> None:
        """Open it. Who has the report sees there what comes of it, and we look later: they need the processors now."""
        if container.is_report_given:
            self._opened[container.id] = time.monotonic()
        else:
            self._watch_report(container)
        with suppress(ConnectionError):  # it has ended: the report says why, or nothing
            os.write(container.gate, b"g")
        self._close_gate(container)

    def _settle_opened(self, for_seconds: float = 0) -> None:
        """Look whether programs were executed whose gates were opened so long ago; where not, be told when they are."""
        due = time.monotonic() - for_seconds
        for key in [key for key, when in self._opened.items() if when <= due]:
            container = self._containers[key]
            self._read_report(container)
            if container.report >= 0:
                self._watch_report(container)
            self._opened.pop(key, None)

    def _watch_report(self, container: Container) -> None:
        self._watch(container.report, lambda: self._read_report(container))

    def _read_report(self, container: Container) -> None:
        """Read why the program was not executed, up to the end of file, which alone says nothing.

        Nor does it always come: any process of our user may open the pipe through /proc, and hold it.
        """
        is_over = False
        with suppress(BlockingIOError):
            while chunk := os.read(container.report, 4096):
                container.why = (container.why + chunk)[:4096]
            is_over = True
        stat = read_stat(container.pid)
        has_executed = stat is not None and stat.has_executed
        if not (is_over or has_executed or has_ended(container.pidfd)):
            return
        container.executed = not container.why and has_executed
        self._close_report(container)
        why = container.describe().get("why")
        self._journal.append({"id": container.id, "executed": container.executed, "why": why})
        if container.executed:
            self._tell_who_waits(container)  # of one that did not, its end says more

    def _hold_uts(self, container: Container) -> None:
        """Hold the namespace by which its daemons are told; where that cannot be done now, it is tried again."""
        self._unheld.pop(container.id, None)
        try:
            container.uts = hold_uts_namespace(container.pid)
        except OSError:
            self._unheld[container.id] = container
        if container.uts >= 0:
            container.uts_inode = os.fstat(container.uts).st_ino

    def _tell_start(self, container: Container) -> Message:
        return {"executed": bool(container.executed), "why": container.describe().get("why"), "end": container.end}

    def _tell_who_waits(self, container: Container) -> None:
        connection, container.waiting = container.waiting, None
        if connection is not None:
            self._send(connection, self._tell_start(container))

    def _close_gate(self, container: Container) -> None:
        if container.gate >= 0:
            self._unwatch(container.gate)
            close(container.gate)
            container.gate = -1
        container.owner = None

    def _close_report(self, container: Container) -> None:
        if container.report >= 0:
            self._unwatch(container.report)
            close(container.report)
            container.report = -1
            self._starting.discard(container.id)
            self._opened.pop(container.id, None)

    # An end

    def _note_end(self, container: Container) -> None:
        """Peek at how it ended, without reaping it, and write that down."""
        if container.end is not None or container.pidfd < 0:
            return
        if container.report >= 0:
            self._read_report(container)  # its writers are dead: this reads to the end
        self._close_gate(container)
        end = self._peek(container)
        if end is None:
            self._unreadable.setdefault(container.id, time.monotonic() + _UNSEEN_SECONDS)
            self._unwatch(container.pidfd)  # asked again at each tick
            return
        self._unreadable.pop(container.id, None)
        self._unwatch(container.pidfd)
        container.end = end | {"time": time.time_ns()}
        self._journal.append({"id": container.id, "end": container.end})
        self._ended[container.id] = time.monotonic() + (_ENGINE_TAKES_SECONDS if self._clients else 0)
        self._tell_who_waits(container)
        self._just_ended.append(container)

    def _look_after_ends(self) -> None:
        """Find out of which of those that have just ended nothing is left, mostly of all: it is known from here on."""
        ended, self._just_ended = self._just_ended, []
        if ended:
            self._orphans_now = None  # what they have left is ours by now
            self._members([each for each in ended if self._containers.get(each.id) is each])

    def _peek(self, container: Container) -> Record | None:
        """Return code and signal of one that has ended; None if they cannot be had yet."""
        try:
            found = os.waitid(os.P_PIDFD, container.pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:  # known from the journal alone: all keepers before us are dead
            return self._peek_at_stranger(container)
        if found is not None:
            return {"code": found.si_status, "signal": found.si_code != os.CLD_EXITED}
        # A tracer keeps it from its parent (ptrace(2)); its zombie tells all the same.
        stat = read_stat(container.pid)
        return _read_wait_status(stat.wait_status) if stat is not None and stat.is_zombie and stat.wait_status else None

    def _peek_at_stranger(self, container: Container) -> Record | None:
        if not container.is_proven:  # an end, but whose? The container's came no later
            return {"unseen": True}
        status = read_exit_of_stranger(container.pid, container.pidfd)
        if status is not None:
            return _read_wait_status(status)
        is_over = time.monotonic() > self._unreadable.get(container.id, time.monotonic() + 1)
        return {"unseen": True} if is_over else None

    def _tell_ends(self, containers: Sequence[Container]) -> dict[str, Message]:
        for container in containers:
            if container.end is None and container.pidfd >= 0 and has_ended(container.pidfd):
                self._note_end(container)  # its engine has seen it before us
        with suppress(OSError):
            self._look_after_ends()
        return {each.id: self._tell_end(each) for each in containers}

    def _tell_end(self, container: Container) -> Message:
        return container.describe() | ({"empty": container.is_empty} if container.end else {"running": True})

    def _flush(self) -> None:
        """Make ends durable that no engine has taken in time, and reap what they are of."""
        if self._flushing is not None:
            self._finish_flush()
        now = time.monotonic()
        due = [self._containers[key] for key, when in self._ended.items() if when <= now]
        if not due or self._flushing is not None or not self._journal.is_written or now < self._flush_again_at:
            return
        self._flush_again_at = now + _TICK_SECONDS
        pid = self._journal.begin_flush()
        self._flushing = pid, [self._containers[key] for key in self._ended]

    def _finish_flush(self) -> None:
        assert self._flushing is not None
        pid, containers = self._flushing
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return  # a slow disk; zombies wait
        self._flushing = None
        if status:
            return  # tried again at the next tick
        self._flush_again_at = 0.0
        for container in containers:
            container.is_durable = True
            self._reap(container)

    def _acknowledge(self, keys: Iterable[str]) -> None:
        """Reap containers whose ends their engine has written down; they need not be kept any longer."""
        containers = [each for key in keys if (each := self._containers.get(key)) is not None and each.end is not None]
        with suppress(OSError):
            self._look_after_ends()  # before their sessions' numbers may be others'
        for container in containers:
            self._reap(container)
            container.is_acknowledged = True
        members = self._members(containers)
        told = {each.id: "acknowledged" if members[each.id] else "forgotten" for each in containers}
        self._journal.append(*({"id": key, what: True} for key, what in told.items()))
        for key, what in told.items():
            if what == "forgotten":
                self._drop(key)
        if containers:
            self._rewrite()

    def _reap(self, container: Container) -> None:
        self._ended.pop(container.id, None)
        if not container.is_reaped:
            with suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, container.pidfd, os.WEXITED | os.WNOHANG)
            close(container.pidfd)
            container.pidfd = -1
            container.is_reaped = True
            self._firsts.pop(container.pid, None)

    def _rewrite(self) -> None:
        if self._journal.has_grown() and not any(
            each.is_durable and not each.is_acknowledged for each in self._containers.values()
        ):
            with suppress(OSError):
                self._journal.rewrite(each.describe() for each in self._containers.values())

    # What else belongs to it

    def _orphans(self) -> Orphans:
        """Return the pids of our children that are neither a container's first process nor of our own making."""
        ours = {self._copies.pid, self._spare.pid, self._flushing[0] if self._flushing else 0}
        ours.update(record.get("pid", 0) for record in self._unadopted.values())
        if self._orphans_now is None:
            self._orphans_now = Orphans(set(read_children(os.getpid())).difference(self._firsts, ours))
        return self._orphans_now

    def _members(self, containers: Sequence[Container]) -> dict[str, list[int]]:
        """Return for each container the pids of all that belongs to it and has not ended.

        A process whose parent ends amid the look is nobody's child in it: no longer the parent's, and not ours yet. So
        where nothing is found another look is taken, in which it is ours; and more, as long as our children change: one
        that forks and ends again and again may have done so before it was looked at.
        """
        members: dict[str, list[int]] = {each.id: [] for each in containers}
        pending = [each for each in containers if not each.is_empty]
        before: frozenset[int] | None = None
        for _ in range(1 + _MORE_LOOKS):
            for container in pending:
                members[container.id] = self._look(container)
            pending = [each for each in pending if not members[each.id]]
            if not pending or before == self._orphans().pids:
                break
            before, self._orphans_now = self._orphans().pids, None
        for container in pending:
            container.is_empty = container.end is not None
        if any(each.is_empty for each in pending):  # what they left are zombies, all of which were orphans just now
            self._reap_orphans()
        return members

    def _look(self, container: Container) -> list[int]:
        return container.find_members(self._orphans_of(container), has_session=self._has_session(container))

    def _has_session(self, container: Container) -> bool:
        """Say whether the number of its session is its own."""
        return self._firsts.get(container.pid, container) is container

    def _orphans_of(self, container: Container) -> Orphans:
        return Orphans(list_processes()) if container.is_stranger else self._orphans()

    def _members_but(self, container: Container, but_not: int) -> list[int]:
        """Return the pids of all that belongs to a container now, without the one that asks."""
        self._orphans_now = None
        return [pid for pid in self._members([container])[container.id] if pid != but_not]

    def _signal(
        self, containers: Sequence[Container], number: int, but_not: int, only_session: bool = False
    ) -> dict[str, int]:
        """Send a signal to all that belongs to these containers, and return how many processes of each that is.

        `but_not` is the one that asks: an engine that runs in a container does not signal itself. `only_session` spares
        what has left the session of the first process.
        """
        for container in containers:
            if container.report >= 0 and number == signal.SIGKILL and container.is_wanted:
                _kill(container.pidfd, number)  # it hangs at its gate
        left: dict[str, int] = {}
        pending = containers
        for _ in range(_ROUNDS_OF_SIGKILL if number == signal.SIGKILL else 1):
            self._orphans_now = None
            found = self._members(pending)
            for container in pending:
                members = found[container.id]
                if number:
                    container.remember(members)
                if only_session:
                    members = container.find_session(members)
                members = [pid for pid in members if pid != but_not]
                left[container.id] = len(members)
                if number:
                    self._signal_members(container, members, number, but_not)
            pending = [each for each in pending if left[each.id]]
            if not pending or not number:
                break
        self._orphans_now = None
        return left

    def _signal_members(self, container: Container, members: Sequence[int], number: int, but_not: int) -> None:
        group = _find_group(container, members)
        if group and _read_group(but_not) != container.pid:
            with suppress(OSError):
                os.killpg(container.pid, number)
            members = [pid for pid in members if pid not in group]
        for pid in members:
            self._signal_member(container, pid, number)

    def _signal_member(self, container: Container, pid: int, number: int) -> None:
        if pid == container.pid and container.pidfd >= 0:
            _kill(container.pidfd, number)
            return
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                # Looked at again now that the pidfd holds it: the number may be another's by now.
                for _ in range(2):  # as in `_members`
                    self._orphans_now = None
                    if self._is_member(container, pid):
                        _kill(pidfd, number)
                        break
            finally:
                close(pidfd)

    def _is_member(self, container: Container, pid: int) -> bool:
        """Say whether a process belongs to a container now."""
        orphans = self._orphans_of(container).pids & {pid}
        is_left = orphans and container.find_left(Orphans(orphans), has_session=self._has_session(container))
        return bool(is_left) or pid in self._look(container)

    def _release(self, containers: Sequence[Container], but_not: int) -> dict[str, Message]:
        left = self._signal(containers, signal.SIGKILL, but_not)
        gone = [each for each in containers if not left[each.id]]
        for container in gone:
            self._copies.give_up(container.id)  # that its end is written down may be told later
        over = [each for each in gone if each.is_acknowledged or each.executed is False]
        if not all(each.is_empty for each in over):
            self._reap_orphans()
        for container in over:
            self._forget(container)
        return {key: {"left": number, "copying": self._copies.is_copying(key)} for key, number in left.items()}

    def _reap_orphans(self) -> None:
        for pid in self._orphans().pids:
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)

    def _forget(self, container: Container) -> None:
        self._journal.append({"id": container.id, "forgotten": True})
        if container.end is not None:
            self._reap(container)
        self._drop(container.id)

    def _drop(self, key: str) -> None:
        """Give up all that is held for a container."""
        container = self._containers.pop(key, None)
        if container is None:
            return
        self._ended.pop(key, None)
        self._unreadable.pop(key, None)
        self._unheld.pop(key, None)
        self._close_gate(container)
        self._close_report(container)
        self._firsts.pop(container.pid, None)
        for descriptor in (container.pidfd, container.uts):
            if descriptor >= 0:
                self._unwatch(descriptor)
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
            if not self._find_again(container):
                self._adopt_ended(container)
                return
            if container.executed is None:
                container.executed = _settle_executed(container)
            if container.is_proven:
                container.uts = hold_uts_namespace(pid)
                if container.uts < 0:  # it has ended
                    container.uts = self._hold_uts_of_left(container)
            if container.log:
                self._copies.begin_again(key, container.log)
            if container.end is None:
                self._watch(container.pidfd, lambda: self._note_end(container))
        except BaseException:
            _close_all({container.pidfd, container.uts} - {-1})
            raise
        if record.get("executed") is None:
            self._journal.append({"id": key, "executed": container.executed})
        self._containers[key] = self._firsts[pid] = container
        if container.end is not None:
            self._ended[key] = time.monotonic()

    def _find_again(self, container: Container) -> bool:
        """Hold a container's first process if it is still there, or may be; say whether it is.

        It is the one with the inode. Before Linux 6.9, a child of ours with its pid and start time is: nobody else
        could have reaped it. Of another's child these prove nothing, and it is held for its end alone.
        """
        try:
            container.pidfd = os.pidfd_open(container.pid)
        except OSError as error:
            if error.errno not in _NO_PROCESS:
                raise
        stat = read_stat_of(container.pid, container.pidfd) if container.pidfd >= 0 else None
        container.is_stranger = stat is None or stat.parent != os.getpid()
        if stat is not None:
            inode = self._read_inode(container.pidfd)
            has_proof = bool(inode and container.inode)
            if inode == container.inode if has_proof else stat.start_ticks == container.start_ticks:
                container.is_proven = has_proof or not container.is_stranger
                if container.end is None or not container.is_stranger:
                    return True  # of a stranger that is known to have ended nothing is to be seen
        if container.pidfd >= 0:
            close(container.pidfd)
            container.pidfd = -1
        return False

    def _read_inode(self, pidfd: int) -> int:
        """Return the number that no other process of this boot has; 0 where all pidfds share one (before Linux 6.9)."""
        found = os.fstat(pidfd)
        return 0 if os.path.samestat(found, self._anonymous) else found.st_ino

    def _hold_uts_of_left(self, container: Container) -> int:
        """Return a descriptor of the UTS namespace of what a container has left, -1 if there is none.

        That is an orphan of ours, younger than its first process, in a namespace with the number that was written down.
        Raises OSError if that cannot be looked at now.
        """
        for pid in self._orphans().pids if container.uts_inode else ():
            stat = read_stat(pid)
            if stat is None or stat.start_ticks < container.start_ticks:
                continue
            held = hold_uts_namespace(pid)
            if held >= 0 and os.fstat(held).st_ino == container.uts_inode:
                return held
            _close_all({held} - {-1})
        return -1

    def _adopt_ended(self, container: Container) -> None:
        container.uts = self._hold_uts_of_left(container)
        if container.is_acknowledged and container.uts < 0:
            self._journal.append({"id": container.id, "forgotten": True})
            return
        if container.log:
            self._copies.begin_again(container.id, container.log)
        self._containers[container.id] = container
        container.is_reaped = True
        if container.end is None or container.executed is None:
            # Nobody knows. "Never ran" is not said of what may have run, nor is a code that may be its gate's.
            container.end = {"unseen": True, "time": (container.end or {}).get("time") or time.time_ns()}
            container.executed = True
            self._journal.append({"id": container.id, "end": container.end})

    def _list(self, after: str) -> Message:
        keys = sorted(key for key in self._containers if key > after)
        told = _fit([self._containers[key].describe() for key in keys[:_PAGE]])
        return {"containers": told, "more": len(keys) > len(told)}


def _works_for_us(pid: int) -> bool:
    """Say whether a child of ours is none of a container's: what holds a gate's memory. It is of our session."""
    try:
        return os.getsid(pid) == os.getsid(0)
    except ProcessLookupError:  # it is gone
        return True


def _fit(records: Sequence[Message]) -> Sequence[Message]:
    """Return as many as a message has room for, one at least."""
    room = _MOST_BYTES
    for number, record in enumerate(records):
        room -= len(encode(record))
        if number and room < 0:
            return records[:number]
    return records


def _divide(request: Message) -> list[Message]:
    """Return the requests about single containers that a request stands for."""
    return [request | each for each in request["many"]] if "many" in request else [request]


def _is_meant(request: Message, container: Container) -> bool:
    """Say whether a request means this container: one that names a process may mean another that had its id."""
    return "pid" not in request or (request["pid"], request["start"]) == (container.pid, container.start_ticks)


def _find_group(container: Container, members: Iterable[int]) -> set[int]:
    """Return which are in the process group of the first process, as long as the group's number is surely its own.

    A signal to a group misses nobody in it. Each alone, one that forks and ends just then passes it on to no child.
    """
    if container.is_reaped or container.is_stranger:
        return set()
    return {pid for pid in members if _read_group(pid) == container.pid}


def _read_group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:  # it is gone, or of another pid namespace: 0 is no group of a container's
        return 0


def _settle_executed(container: Container) -> bool:
    """End a process whose gate closed with the keeper before us; say whether it had executed its program just before.

    True where nobody knows: "never ran" is not said of what may have run.
    """
    if not container.is_proven:
        return True
    stat = read_stat_of(container.pid, container.pidfd)
    if stat is not None and not stat.has_executed:
        _kill(container.pidfd, signal.SIGKILL)
        has_ended(container.pidfd, _END_SECONDS)
        stat = read_stat_of(container.pid, container.pidfd)
    return stat is None or stat.has_executed


def _read_wait_status(status: int) -> Record:
    return {"code": status & 0x7F or status >> 8, "signal": bool(status & 0x7F)}


def _kill(pidfd: int, number: int) -> None:
    with suppress(OSError):
        signal.pidfd_send_signal(pidfd, number)


def _read_boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return file.read().strip()


def _open_null() -> tuple[int, int]:
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    return null, null


def _drain(descriptor: int) -> None:
    with suppress(BlockingIOError):
        while os.read(descriptor, 4096):
            pass


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in set(descriptors):
        close(descriptor)
