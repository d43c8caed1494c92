"""Serves commands beside a live engine: one thread for all who ask and wait, and a short one for each step.

Nobody who asks is trusted to be well meaning, quick, or there: reads are bounded, each step has a deadline, and what
goes wrong with one caller never reaches another, nor the engine. A stale socket, which a killed engine leaves, is
replaced. A fork of the engine's process closes its copies at once, or nobody would see the engine end.
"""

import os
import select
import socket
import threading
import time
from collections import deque
from contextlib import AbstractContextManager, suppress
from functools import partial
from weakref import WeakSet

from limpet.engine.control.messages import (
    BEAT_SECONDS,
    BLOCK,
    DIRECTORY_MODE,
    LONGEST_REQUEST,
    SILENCE_SECONDS,
    SOCKET,
    SOCKET_MODE,
    decode_request,
    encode_error,
    encode_result,
    read_peer,
)
from limpet.engine.control.requests import (
    REQUEST,
    AnyRequest,
    AnyStream,
    CreateAndStart,
    Info,
    Load,
    Stop,
    Wait,
    Waiting,
    perform,
)
from limpet.engine.control.served import Served
from limpet.engine.control.streams import serve_stream
from limpet.engine.state.descriptors import NOTICED_SECONDS, close_all
from limpet.engine.state.durable import make_one_directory
from limpet.engine.state.names import CONTROL
from limpet.recovery.queues import Empty, Queue
from limpet.recovery.thread import Thread, go_on
from limpet.schema.errors import ClosedError, InvalidInputError, LimpetError, ResourcesError
from limpet.schema.telling import get_log

_log = get_log("limpet.control")
_MOST_CALLERS = 128
"""How many are attended to at a time, besides those who wait for a container's end; others wait to be let in."""
_MOST_WAITING = 512
"""How many wait for containers' ends. Each has a descriptor of the engine's, of which there may be 1024."""
_MOST_STEPS = 64
"""How many steps are taken at a time, each on a thread; others wait for their turn."""
_MOST_LONG_STEPS = 48
"""How many of these may be such as take long: there is always room for one that ends what the others wait for."""
_MOST_STREAMS = 64
_CLOSE_SECONDS = 1.0
"""How long the end of steps and sessions is waited for when the engine is closed."""
_BACKLOG = 128

_open: WeakSet[socket.socket] = WeakSet()


def _close_after_fork() -> None:
    for each in list(_open):
        each.close()


os.register_at_fork(after_in_child=_close_after_fork)


class _Caller:
    """One who asks: first its request is read, then it is worked on or waited for, then the answer is sent."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.received = bytearray()
        self.to_send = b""
        self.deadline = time.monotonic() + SILENCE_SECONDS
        self.next_beat = 0.0
        self.waits_for: Waiting | None = None
        self.bell: AbstractContextManager[None] | None = None
        self.is_read = False

    @property
    def events(self) -> int:
        """What to be told of; that the other side is gone is told in any case."""
        if self.to_send:
            return select.POLLOUT
        return 0 if self.is_read else select.POLLIN

    def send_some(self) -> bool:
        """Send what can be sent; say whether that is all. Raises OSError."""
        self.to_send = self.to_send[self.link.send(self.to_send, socket.MSG_NOSIGNAL) :]
        self.deadline = time.monotonic() + SILENCE_SECONDS
        return not self.to_send

    def beat(self) -> None:
        """Tell that it is being worked on. Raises OSError."""
        self.next_beat = time.monotonic() + BEAT_SECONDS
        with suppress(BlockingIOError):  # it does not read; its answer will have a deadline
            self.link.send(b"\n", socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Leave it. May be repeated."""
        bell, self.bell = self.bell, None
        if bell is not None:
            bell.__exit__(None, None, None)
        self.link.close()


class ControlServer:
    """The socket of one engine. `listen` makes it, `serve` begins to answer, `leave` and `close` end it."""

    def __init__(self, path: str, door: socket.socket) -> None:
        self._path = path
        self._door = door
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._guard = threading.Lock()
        self._is_closing = self._is_over = False
        self._engine: Served | None = None
        self._thread: threading.Thread | None = None
        self._callers: dict[int, _Caller] = {}
        self._pending: deque[tuple[_Caller, AnyRequest]] = deque()
        self._streams: dict[socket.socket, threading.Thread] = {}
        self._steps: dict[threading.Thread, tuple[_Caller, AnyRequest]] = {}
        self._done: Queue[tuple[threading.Thread, bytes]] = Queue()
        self._changed: Queue[_Caller] = Queue()
        self._full_until = 0.0

    @classmethod
    def listen(cls, state_dir: str) -> "ControlServer":
        """Make the socket in a state directory whose lock the caller holds. Who connects waits for `serve`.

        Raises OSError.
        """
        directory_path = os.path.join(state_dir, CONTROL)
        with suppress(FileExistsError):
            make_one_directory(directory_path, DIRECTORY_MODE)
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            directory = os.open(directory_path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                with suppress(FileNotFoundError):
                    os.unlink(SOCKET, dir_fd=directory)
                os.fchmod(door.fileno(), SOCKET_MODE)
                door.bind(f"/proc/self/fd/{directory}/{SOCKET}")  # a path may be longer than a socket's address
                os.chmod(SOCKET, SOCKET_MODE, dir_fd=directory)  # a umask may have taken more than it may
            except IsADirectoryError as error:
                path = os.path.join(directory_path, SOCKET)
                raise IsADirectoryError(error.errno, "it is a directory; move it away and try again", path) from error
            finally:
                os.close(directory)
            door.listen(_BACKLOG)
            server = cls(os.path.join(directory_path, SOCKET), door)
        except BaseException:
            door.close()
            raise
        _open.add(door)
        return server

    def serve(self, engine: Served) -> None:
        """Begin to answer. Raises ResourcesError if no thread can be started."""
        self._engine = engine
        thread = Thread(target=self._run, name="limpet-control")
        try:
            thread.start()
        except RuntimeError as error:
            raise ResourcesError(f"no thread can be started that answers commands: {error}") from error
        self._thread = thread

    def leave(self) -> None:
        """Take the socket's name away, while the lock is still held: the next engine makes its own."""
        with suppress(OSError):  # what stays is stale, and is replaced
            os.unlink(self._path)

    def close(self) -> None:
        """Tell all who wait that the engine is closed, and end. May be repeated."""
        with self._guard:
            self._is_closing = True
        thread, self._thread = self._thread, None
        if thread is None:
            self._end()
        else:
            self._ring()
            thread.join()

    def _end(self) -> None:
        with self._guard:
            if self._is_over:
                return
            self._is_over = True
            close_all((self._wake,))
        for caller in list(self._callers.values()):
            with suppress(OSError):
                caller.close()
        self._callers.clear()
        with suppress(OSError):  # it is closed, also where an error is reported
            self._door.close()

    def _ring(self) -> None:
        """Wake the loop, unless it is over."""
        with self._guard, suppress(OSError):  # somebody has closed it, which is seen in a while
            if not self._is_over:
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        try:
            go_on(self._turn, self._leave_all, lambda: self._is_closing, _log, "answering commands")
            self._finish()
        except Exception:  # noqa: BLE001  # those who ask see it end
            _log.exception("commands are not answered any more")
        finally:
            self._end()

    def _turn(self) -> None:
        """Wait for something to happen, and see to it."""
        self._wait_for_events()
        self._look_at_changed()
        self._take_results()
        self._keep_time()
        self._forget_streams()

    def _leave_all(self) -> None:
        """Leave all who ask: an answer may be lost. They see that, and ask again."""
        self._pending.clear()
        for caller in list(self._callers.values()):
            self._leave(caller)

    def _wait_for_events(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        now = time.monotonic()
        # Who waits for a container may do so for ever: that must not keep out who would stop it.
        accepts = len(self._callers) - self._count_waiting() < _MOST_CALLERS and now >= self._full_until
        if accepts:
            poll.register(self._door, select.POLLIN)
        for number, caller in self._callers.items():
            poll.register(number, caller.events)
        is_quiet = accepts and not self._callers
        for number, event in poll.poll(1000 * (NOTICED_SECONDS if is_quiet else BEAT_SECONDS / 4)):
            if number == self._wake:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif number == self._door.fileno():
                self._accept()
            elif number in self._callers:
                self._attend(self._callers[number], event)

    def _accept(self) -> None:
        try:
            link, _ = self._door.accept()
        except BlockingIOError:
            return
        except OSError as error:  # it went away again; or no descriptor is left
            self._full_until = time.monotonic() + BEAT_SECONDS
            _log.warning("a command could not be let in: %s", error)
            return
        link.setblocking(False)
        _open.add(link)
        try:
            _, uid = read_peer(link)
        except OSError:
            link.close()
            return
        caller = _Caller(link)
        self._callers[link.fileno()] = caller
        if uid not in {os.geteuid(), 0}:
            self._answer(caller, encode_error(InvalidInputError(f"user {uid} may not ask this engine")))

    def _attend(self, caller: _Caller, event: int) -> None:
        """See to one who asks: read, send, or leave it."""
        try:
            if event & select.POLLOUT and caller.to_send:
                if caller.send_some():
                    self._leave(caller)
            elif event & select.POLLIN and not caller.is_read:
                self._read(caller)
            elif event & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                self._leave(caller)
        except BlockingIOError:
            return
        except OSError:  # it is gone
            self._leave(caller)
        except Exception:  # noqa: BLE001  # whatever it is, the others are answered
            _log.exception("a command cannot be answered")
            self._leave(caller)

    def _read(self, caller: _Caller) -> None:
        block = caller.link.recv(BLOCK)
        if not block:
            self._leave(caller)
            return
        caller.received += block
        line, newline, _ = caller.received.partition(b"\n")
        if newline:
            caller.is_read = True
            caller.received = bytearray()
            self._begin(caller, bytes(line))
        elif len(caller.received) > LONGEST_REQUEST:
            error = InvalidInputError(f"a request has {LONGEST_REQUEST} bytes at most")
            self._answer(caller, encode_error(error))

    def _begin(self, caller: _Caller, line: bytes) -> None:
        assert self._engine is not None
        try:
            request: AnyRequest | AnyStream = decode_request(line, REQUEST, self._engine.store.node)
        except LimpetError as error:
            self._answer(caller, encode_error(error))
            return
        if isinstance(request, AnyStream):
            self._hand_over(caller, request)
            return
        caller.beat()
        if isinstance(request, Wait):
            self._wait(caller, request)
        elif isinstance(request, Info):  # answered also while all steps are taken
            self._answer(caller, self._perform(request))
        else:
            self._pending.append((caller, request))
            self._take_steps()

    def _hand_over(self, caller: _Caller, request: AnyStream) -> None:
        """Give the connection to a thread of its own, which serves a session on it."""
        assert self._engine is not None
        if len(self._streams) >= _MOST_STREAMS:
            self._answer(caller, encode_error(ResourcesError(f"there are {_MOST_STREAMS} sessions; end one first")))
            return
        engine, link = self._engine, caller.link

        def serve() -> None:
            try:
                serve_stream(engine, link, request)
            except Exception:  # noqa: BLE001  # who asked sees it end, and the engine goes on
                _log.exception("a session failed: %r", request)

        thread = Thread(target=serve, name="limpet-control-session")
        number = link.fileno()
        del self._callers[number]  # before it starts: it may have closed the connection a moment later
        self._streams[link] = thread
        try:
            thread.start()
        except RuntimeError:
            del self._streams[link]
            self._callers[number] = caller
            self._answer(caller, encode_error(ResourcesError("no thread can be started; try again")))

    def _forget_streams(self) -> None:
        for link in [each for each, thread in self._streams.items() if not thread.is_alive()]:
            del self._streams[link]

    def _count_waiting(self) -> int:
        return sum(caller.waits_for is not None for caller in self._callers.values())

    def _wait(self, caller: _Caller, request: Wait) -> None:
        assert self._engine is not None
        if self._count_waiting() >= _MOST_WAITING:
            error = ResourcesError(f"{_MOST_WAITING} commands wait for containers of this engine; end one first")
            self._answer(caller, encode_error(error))
            return
        try:
            waiting = Waiting(self._engine, request)
            bell = waiting.container.notify(partial(self._note_change, caller))
            bell.__enter__()
        except LimpetError as error:
            self._answer(caller, encode_error(error))
            return
        caller.bell, caller.waits_for = bell, waiting
        self._look_at(caller)

    def _note_change(self, caller: _Caller) -> None:
        self._changed.put(caller)
        self._ring()

    def _look_at_changed(self) -> None:
        with suppress(Empty):
            while True:
                self._look_at(self._changed.get_nowait())

    def _look_at(self, caller: _Caller) -> None:
        """Answer one who waits, if the container has ended."""
        if caller.waits_for is None or caller.to_send:
            return
        try:
            done = caller.waits_for.look()
        except LimpetError as error:
            self._answer(caller, encode_error(error))
            return
        if done is not None:
            self._answer(caller, encode_result(done))

    def _take_steps(self) -> None:
        waiting, self._pending = self._pending, deque()
        for caller, request in waiting:
            if caller.link.fileno() < 0:
                continue  # it went away before its turn
            if len(self._steps) >= _MOST_STEPS or (_takes_long(request) and self._has_long_steps()):
                self._pending.append((caller, request))
                continue
            thread = Thread(target=self._step, args=(request,), name="limpet-control-step")
            self._steps[thread] = caller, request
            try:
                thread.start()
            except RuntimeError:
                del self._steps[thread]
                self._answer(caller, encode_error(ResourcesError("no thread can be started; try again")))

    def _has_long_steps(self) -> bool:
        return sum(_takes_long(request) for _, request in self._steps.values()) >= _MOST_LONG_STEPS

    def _step(self, request: AnyRequest) -> None:
        """Do what is asked, on a thread of its own."""
        answer = b""
        with suppress(BaseException):  # there is no memory even for an error: then who asked sees the end
            answer = self._perform(request)
        self._done.put((threading.current_thread(), answer))
        self._ring()

    def _perform(self, request: AnyRequest) -> bytes:
        """Do what is asked, and return the answer."""
        assert self._engine is not None
        try:
            return encode_result(perform(self._engine, request))
        except LimpetError as error:
            return encode_error(error)
        except Exception as error:  # noqa: BLE001  # who asked is told, and the engine goes on
            _log.warning("a command failed: %r", request, exc_info=error)
            return encode_error(LimpetError(f"the engine failed: {error!r}; see its log"))

    def _take_results(self) -> None:
        ended = [thread for thread in self._steps if not thread.is_alive()]
        with suppress(Empty):
            while True:
                self._end_step(*self._done.get_nowait())
        for thread in ended:  # those that could not tell, for want of memory
            self._end_step(thread, b"")
        self._take_steps()

    def _end_step(self, thread: threading.Thread, answer: bytes) -> None:
        """Answer who has asked for what a thread has done; without an answer it sees the end, and asks again."""
        caller, _ = self._steps.pop(thread, (None, None))
        if caller is not None and answer:
            self._answer(caller, answer)
        elif caller is not None:
            self._leave(caller)

    def _answer(self, caller: _Caller, line: bytes) -> None:
        """Send the answer, and leave; what cannot be sent now is sent when it can be."""
        if caller.link.fileno() < 0:
            return
        caller.waits_for = None
        caller.is_read = True
        caller.to_send = line
        try:
            if caller.send_some():
                self._leave(caller)
        except BlockingIOError:
            return
        except OSError:
            self._leave(caller)

    def _keep_time(self) -> None:
        now = time.monotonic()
        for caller in list(self._callers.values()):
            is_worked_on = caller.is_read and not caller.to_send
            if not is_worked_on:
                if now > caller.deadline:
                    self._leave(caller)
            elif now >= caller.next_beat:
                try:
                    caller.beat()
                except OSError:
                    self._leave(caller)
                else:
                    self._look_at(caller)

    def _leave(self, caller: _Caller) -> None:
        self._callers.pop(caller.link.fileno(), None)
        caller.close()

    def _finish(self) -> None:
        """Give steps that are under way a moment to end, and tell all others that the engine is closed."""
        closed = encode_error(ClosedError("the engine was closed"))
        self._pending.clear()
        for caller in [each for each in self._callers.values() if each.waits_for is not None]:
            self._answer(caller, closed)
        for link in self._streams:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        latest = time.monotonic() + _CLOSE_SECONDS
        for thread in self._streams.values():  # their commands are killed, and their files removed
            thread.join(max(latest - time.monotonic(), 0))
        while self._steps and (left := latest - time.monotonic()) > 0:
            try:
                self._end_step(*self._done.get(timeout=left))
            except Empty:
                break
        for caller in list(self._callers.values()):
            if caller.is_read:
                self._answer(caller, closed)


def _takes_long(request: AnyRequest) -> bool:
    """Return whether a step may take long: images are unpacked, or a container has time to end."""
    return isinstance(request, CreateAndStart | Load) or (isinstance(request, Stop) and request.timeout > 0)
