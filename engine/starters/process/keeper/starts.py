"""Starts: a gate is taken, told what it is to become, opened, and watched until its program is executed, or is not."""

import os
import signal
import socket
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress

from .container import Container
from .copies import Copies
from .journal import Journal, Record
from .kernel import (
    close,
    close_all,
    has_ended,
    hold_uts_namespace,
    kill,
    let_go_on,
    open_null,
    read_inode,
    read_stat,
)
from .loop import Loop
from .messages import Message, divide
from .spare import Spare, hand_over


class Starts:
    """The starts of a keeper's containers, and the gate that is forked ahead of the next."""

    def __init__(
        self,
        loop: Loop,
        journal: Journal,
        copies: Copies,
        containers: MutableMapping[str, Container],
        firsts: MutableMapping[int, Container],
        send: Callable[..., None],
        note_end: Callable[[Container], None],
    ) -> None:
        """`send` answers a connection; `note_end` is called when a first process has ended."""
        self._loop = loop
        self._journal = journal
        self._copies = copies
        self._containers = containers
        self._firsts = firsts
        self._send = send
        self._note_end = note_end
        self._starting: set[str] = set()  # containers whose start is not over
        self._opened: dict[str, float] = {}  # whose gates were opened, and when: what came of it is looked at later
        self._unheld: dict[str, Container] = {}  # whose UTS namespaces could not be looked at yet
        self._last = 0.0
        self.spare = Spare()

    @property
    def wants_spare(self) -> bool:
        """Say whether to fork a gate ahead."""
        return self.spare.is_wanted and not self._starting

    @property
    def gates(self) -> "list[int]":
        """The processes that wait, or are on their way, to become programs."""
        return [self.spare.pid, *(self._containers[key].pid for key in self._starting)]

    @property
    def can_be_furthered(self) -> bool:
        """Say whether there is anything to do that can wait until it is quiet."""
        return bool(self._opened or self.wants_spare)

    @property
    def has_undone(self) -> bool:
        """Say whether `do_again` has anything to try."""
        return bool(self._unheld or self._find_unopened())

    def prepare(self, connection: socket.socket, request: Message, descriptors: list[int]) -> None:
        """Give a container a gate, and answer. It is held until `go`; whatever fails, no process is left."""
        key = request["id"]
        self._last = time.monotonic()
        plan, *rest = descriptors
        log_directory, view = (rest[:-2], rest[-2:]) if request.get("view") else (rest, [])
        opened: list[int] = []
        log = request.get("log")
        try:
            try:
                streams = self._copies.make(key, log, request.get("owner", -1)) if log else open_null()
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
            self._hand_over(container, (plan, *opened, *view))
        finally:
            close_all(opened)

    def go(self, connection: socket.socket, container: Container) -> Message | None:
        """Open the gate once it is ready; the answer comes once the program is executed, or is not."""
        if container.gate < 0:
            return self._tell_start(container)
        container.waiting, container.owner, container.is_wanted = connection, None, True
        if container.is_ready:
            self._open_gate(container)
        return None

    def settle_asked(self, connection: socket.socket, request: Message) -> None:
        """Take note of a program that was executed before this request was made: its engine sees that as soon as we."""
        keys = {each.get("id") for each in divide(request)} if self._starting else ()
        for container in [self._containers[each] for each in self._starting]:
            if container.waiting is connection or (container.id in keys and container.gate < 0):
                self.read_report(container)

    def settle_opened(self, for_seconds: float = 0) -> None:
        """Look whether programs were executed whose gates were opened so long ago; where not, be told when they are."""
        due = time.monotonic() - for_seconds
        for key in [key for key, when in self._opened.items() if when <= due]:
            container = self._containers[key]
            self.read_report(container)
            if container.report >= 0:
                self._watch_report(container)
            self._opened.pop(key, None)

    def read_report(self, container: Container) -> None:
        """Read why the program was not executed, up to the end of file, which alone says nothing.

        Nor does it always come: any process of our user may open the pipe through /proc, and hold it.
        """
        is_over = has_ended(container.pidfd)  # before: what may become of it while we look is not seen half
        with suppress(BlockingIOError):
            while chunk := os.read(container.report, 4096):
                container.why = (container.why + chunk)[:4096]
            is_over = True
        stat = read_stat(container.pid)
        has_executed = stat is not None and stat.has_executed
        if not (is_over or has_executed):
            return
        container.executed = not container.why and has_executed
        self._close_report(container)
        why = container.describe().get("why")
        self._journal.append({"id": container.id, "executed": container.executed, "why": why})
        if container.executed:
            self.tell_who_waits(container)  # of one that did not, its end says more

    def tell_who_waits(self, container: Container) -> None:
        """Answer who waits for its program to be executed, if anybody does."""
        connection, container.waiting = container.waiting, None
        if connection is not None:
            self._send(connection, self._tell_start(container))

    def close_gate(self, container: Container) -> None:
        """Close the gate, if it is open to us: what is held there, and was not told to go, ends."""
        if container.gate >= 0:
            self._loop.unwatch(container.gate)
            close(container.gate)
            container.gate = -1
        container.owner = None

    def drop(self, container: Container) -> None:
        """Give up what is held for its start."""
        self._unheld.pop(container.id, None)
        self.close_gate(container)
        self._close_report(container)

    def do_again(self) -> None:
        """Try again to open and to hold what could not be opened or held."""
        for container in self._find_unopened():
            self._open_gate(container)
        for container in list(self._unheld.values()):
            self._hold_uts(container)
            self._journal.append({"id": container.id, "uts": container.uts_inode})

    def _find_unopened(self) -> list[Container]:
        """Return those whose gates are to be open by now, and could not be opened."""
        starting = (self._containers[key] for key in self._starting)
        return [each for each in starting if each.is_ready and each.is_wanted and each.gate >= 0]

    def give_up_spare(self, after_seconds: float = 0) -> None:
        """End the gate that waits if nothing was started for so long."""
        if self.spare.pid and time.monotonic() - self._last > after_seconds:
            self.spare.give_up()

    def _enter(self, key: str, report: int, log: Record | None) -> Container:
        """Take a gate and watch it: it is a container's from now on. `report` is closed if that fails."""
        gate = None
        try:
            gate = self.spare.take()
            container = Container(key, gate.pid, gate.start_ticks, gate.pidfd, log)
            container.inode = read_inode(gate.pidfd, self._loop.anonymous)
            self._loop.watch(gate.pidfd, lambda: self._note_end(container))
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
            self._loop.watch(container.gate, lambda: self._note_ready(container))
            with suppress(OSError):
                let_go_on(container.pid)
        except Exception as error:  # noqa: BLE001  # it is answered already
            reason = getattr(error, "strerror", None) or error
            container.why = f"its gate could not be told what it is to become: {reason}".encode()
            kill(container.pidfd, signal.SIGKILL)

    def _note_ready(self, container: Container) -> None:
        """Hold the UTS namespace that the gate has entered: by it the daemons are told of a program that ends at once.

        So it comes before the gate is opened; mostly the engine is writing down meanwhile that the container runs.
        """
        self._loop.unwatch(container.gate)
        container.is_ready = True  # nothing tells of it again, whatever fails from here on
        self._hold_uts(container)
        if container.uts_inode:
            self._journal.append({"id": container.id, "uts": container.uts_inode})
        if container.is_wanted:
            self._open_gate(container)

    def _open_gate(self, container: Container) -> None:
        """Open it, now or at the next tick.

        Who has the report sees there what comes of it, and we look later: they need the processors now.
        """
        try:
            with suppress(ConnectionError):  # it has ended: the report says why, or nothing
                os.write(container.gate, b"g")
        except OSError:  # the kernel has no memory for it now
            return
        self.close_gate(container)
        self._opened[container.id] = time.monotonic()
        if not container.is_report_given:
            self.settle_opened()

    def _watch_report(self, container: Container) -> None:
        self._loop.watch(container.report, lambda: self.read_report(container))

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

    def _close_report(self, container: Container) -> None:
        if container.report >= 0:
            self._loop.unwatch(container.report)
            close(container.report)
            container.report = -1
            self._starting.discard(container.id)
            self._opened.pop(container.id, None)
