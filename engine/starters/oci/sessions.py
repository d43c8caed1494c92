"""Connections to programs in a container: a command that the runtime runs there, and conmon's door to its own program.

Kernel interfaces: pty(7), unix(7).
"""

import errno
import os
import pty
import select
import signal
import socket
import stat
import struct
import subprocess
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from fcntl import ioctl

from limpet.engine.starters.abilities import Chunk
from limpet.engine.starters.oci.child import UNKNOWN, WHY_UNKNOWN, Child
from limpet.engine.starters.oci.command import LOOK_SECONDS, clean_environment, reap, shorten
from limpet.engine.starters.oci.commands import CommandFiles, have_runtime_go_on
from limpet.engine.starters.oci.exits import is_monitor_alive, let_monitor_go_on
from limpet.engine.starters.oci.family import kill_family
from limpet.engine.starters.oci.run_directory import Processes, RunDirectory
from limpet.engine.starters.signals import let_go_on
from limpet.engine.state.descriptors import close_all, is_of_handler, system_errors_passed_over
from limpet.engine.state.forks import undisturbed
from limpet.engine.state.pipes import write_to_pipe
from limpet.recovery.host import wait_for_end
from limpet.schema.errors import InvalidStateError, LimpetError, ResourcesError, StartError, WaitTimeoutError

_BLOCK = 65536
_PACKET = 8192
"""The most that conmon takes, and gives, at a time."""
_STREAMS = {2: "stdout", 3: "stderr"}
"""The first byte of each packet of conmon's."""
_END_OF_TEXT = b"\x04"
_DRAIN_SECONDS = 0.5
"""How long to read on once a command has ended, where what it has started still holds its output open."""
_TAIL_BYTES = 4096
_ANSWER_SECONDS = 10.0
"""How long the runtime may take to hand over a terminal, and conmon to let somebody attach."""
_BEGIN_SECONDS = 0.005
"""Between two looks at whether a command has begun, once something is written."""
_MOST_HELD = 16
"""How many blocks are taken before it has."""
_THOROUGH_LOOKS = 5
"""As often it is looked, once the command has begun, whether what becomes its program was stopped before it is. Then
the runtime alone is looked at: a connection may be idle for long, and a host have many processes."""


def _until_look(deadline: float | None) -> float:
    """Return how many seconds to wait at most: until a deadline, if there is one, or the next look."""
    return LOOK_SECONDS if deadline is None else min(max(deadline - time.monotonic(), 0), LOOK_SECONDS)


class CommandSession:
    """A command that the runtime runs in a container; see `abilities.Session`.

    It has a terminal if that has a size, in rows and columns. The runtime works in `directory`; the `files` are removed
    in the end. At `door`, if there is one, the runtime hands over the terminal: then it is not in between. `end_orphan`
    ends a command whose runtime was killed, `explain` tells why one has not begun, given what the runtime said, and
    `resize` gives its terminal a size.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        size: tuple[int, int] | None,
        directory: str,
        door: socket.socket | None,
        files: CommandFiles,
        end_orphan: Callable[[], None],
        explain: Callable[[str], LimpetError],
        resize: Callable[[bytes], None],
    ) -> None:
        self._files, self._end_orphan, self._explain, self._resize = files, end_orphan, explain, resize
        self._terminal = -1
        self._tail = b""
        self._guard = threading.RLock()  # of the input; a signal may come amid a write, and close
        self._streams: dict[int, str] = {}
        self._held = deque[Chunk]()
        self._is_begun = False
        self._ended_at = 0.0
        self._is_closed = False
        self._look_at, self._thorough_looks = time.monotonic() + LOOK_SECONDS, _THOROUGH_LOOKS
        self.has_terminal = size is not None
        with ExitStack() as undo:
            undo.callback(files.remove)
            self._poll = undo.enter_context(select.epoll())
            if size is None:
                self._process = self._run(command, directory, subprocess.PIPE, subprocess.PIPE, subprocess.PIPE)
            elif door is None:
                with undisturbed():
                    self._terminal, far = pty.openpty()
                    undo.callback(os.close, self._terminal)
                    try:
                        tty.setraw(far)  # the terminal within does what is to be done with lines
                        ioctl(far, termios.TIOCSWINSZ, _pack(*size))
                        self._process = self._run(command, directory, far, far, far)
                    finally:
                        os.close(far)
            else:
                undo.callback(door.close)
                self._process = self._run(command, directory, subprocess.DEVNULL, subprocess.DEVNULL, subprocess.PIPE)
            undo.callback(self._give_up)
            if self._process.pidfd < 0:
                raise ResourcesError(WHY_UNKNOWN)
            self._pidfd = os.dup(self._process.pidfd)
            undo.callback(os.close, self._pidfd)
            self._poll.register(self._pidfd, select.EPOLLIN)
            if door is not None:
                self._terminal = self._accept(door)
                if self._terminal >= 0:
                    undo.callback(os.close, self._terminal)
                door.close()
            if self._terminal >= 0:
                self._add(self._terminal, "stdout")
            if (target := self._input()) >= 0:
                os.set_blocking(target, False)
            if self._process.stdout is not None:
                self._add(self._process.stdout.fileno(), "stdout")
            if self._process.stderr is not None:
                self._add(self._process.stderr.fileno(), "stderr")
            undo.pop_all()

    def _run(self, command: Sequence[str], directory: str, stdin: int, stdout: int, stderr: int) -> Child:
        return Child(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            directory=directory,
            environment=clean_environment(),
            is_buffered=False,
            begins_users=True,
        )

    def _accept(self, door: socket.socket) -> int:
        """Return the terminal that the runtime hands over, -1 if it ends before. Raises StartError for neither."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        if not (ready := self._wait_for_any(deadline, door.fileno(), self._pidfd)):
            raise StartError("the runtime has not made a terminal in time")
        if door.fileno() not in ready:
            return -1
        link, _ = door.accept()
        with link:
            if not self._wait_for_any(deadline, link.fileno()):
                raise StartError("the runtime has not handed over a terminal in time")
            _, descriptors, _, _ = socket.recv_fds(link, _BLOCK, 1)
        if not descriptors:
            return -1
        if not os.isatty(descriptors[0]):
            close_all(descriptors)
            raise StartError("what the runtime handed over is no terminal")
        os.set_inheritable(descriptors[0], False)
        return descriptors[0]

    def _wait_for_any(self, deadline: float, *descriptors: int) -> set[int]:
        """Return which of these can be read, nothing if none can in time; the runtime goes on that was stopped."""
        poll = select.poll()
        for each in descriptors:
            poll.register(each, select.POLLIN)
        while not (ready := poll.poll(_until_look(deadline) * 1000)):
            if time.monotonic() >= deadline:
                break
            self._have_runtime_go_on()
        return {number for number, _ in ready}

    def _have_runtime_go_on(self) -> None:
        """Continue the runtime if a signal has stopped it, and what has not become the command yet; each second."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        if self._thorough_looks:
            self._thorough_looks -= self._has_begun()
            have_runtime_go_on(self._process.pid)
        with suppress(OSError):
            let_go_on(self._process.pid, self._pidfd)

    def _give_up(self) -> None:
        """End a command that nobody can talk to: for want of descriptors, say."""
        if self._process.poll() is None:
            with suppress(OSError):
                kill_family(self._process.pid, self._process.pidfd, sessions=True, is_waited_for=True)
            self._process.kill()
        reap(self._process)
        self._end_orphan()
        self._process.close()

    def _add(self, descriptor: int, stream: str) -> None:
        self._streams[descriptor] = stream
        self._poll.register(descriptor, select.EPOLLIN)

    def read(self, timeout: float | None = None) -> Chunk | None:
        """Return what it has written next."""
        if self._is_closed:
            raise InvalidStateError("the session is closed")
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (self._held and self._has_begun()):
            if not self._streams:
                if not self._held or not wait_for_end(self._pidfd, _DRAIN_SECONDS) or not self._has_begun():
                    return None
                break
            latest = self._ended_at + _DRAIN_SECONDS if self._ended_at else deadline
            if deadline is not None and latest is not None:
                latest = min(latest, deadline)
            left = _until_look(latest)
            ready = self._poll.poll(_BEGIN_SECONDS if self._held else left)
            if not ready:
                self._have_runtime_go_on()
            if not ready and self._ended_at and time.monotonic() >= self._ended_at + _DRAIN_SECONDS:
                self._streams.clear()
            elif (not ready or self._is_full()) and deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeoutError(f"nothing was written for {timeout:g} s")
            self._take_some([descriptor for descriptor, _ in ready])
        return self._held.popleft()

    def _has_begun(self) -> bool:
        """Say whether the runtime has begun the command: what was written before is the runtime's own."""
        self._is_begun = self._is_begun or self._files.read_pid() > 0
        return self._is_begun

    def _take_some(self, ready: Sequence[int]) -> None:
        """Take what is written to these streams, and note who has ended."""
        if self._is_full():
            time.sleep(_BEGIN_SECONDS)
        for descriptor in ready:
            if descriptor == self._pidfd:
                self._poll.unregister(descriptor)
                self._ended_at = time.monotonic()
            elif not self._is_full():
                data = self._take(descriptor)
                if data is None:  # another thread has it
                    continue
                if data:
                    self._tail = (self._tail + data)[-_TAIL_BYTES:]
                    if not self.has_terminal or descriptor == self._terminal:  # or it is the runtime's own
                        self._held.append(Chunk(self._streams[descriptor], data))
                else:
                    self._poll.unregister(descriptor)
                    del self._streams[descriptor]

    def _is_full(self) -> bool:
        """Say whether no more is taken until the command has begun; once the runtime has ended, all is."""
        return len(self._held) >= _MOST_HELD and not self._ended_at

    def _take(self, descriptor: int) -> bytes | None:
        try:
            return os.read(descriptor, _BLOCK)
        except BlockingIOError:
            return None
        except OSError as error:  # a terminal that nobody has open any more
            if is_of_handler(error):
                raise
            return b""

    def write(self, data: bytes) -> None:
        """Write to its input."""
        with self._guard, system_errors_passed_over():
            target = self._input()
            while data and target >= 0 and not self._is_closed:
                try:
                    data = data[write_to_pipe(target, data) :]
                except BlockingIOError:
                    if not _wait_until_writable(target):
                        self._have_runtime_go_on()

    def _input(self) -> int:
        if self._terminal >= 0:
            return self._terminal
        stdin = self._process.stdin
        return -1 if stdin is None or stdin.closed else stdin.fileno()

    def end_input(self) -> None:
        """Close its input."""
        if self._terminal >= 0:
            self.write(_END_OF_TEXT)
        else:
            with self._guard:
                self._process.close_input()

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal a size, and the runtime's, which some hand on and others do not."""
        if self._terminal >= 0:
            size = _pack(rows, columns)
            with system_errors_passed_over():
                ioctl(self._terminal, termios.TIOCSWINSZ, size)
                try:
                    self._resize(size)
                except PermissionError:  # without root, of another user in the container: runc hands it on, a bit later
                    signal.pidfd_send_signal(self._pidfd, signal.SIGWINCH)

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the command's exit code: that of SIGKILL if `close` came first, whether or not it had begun."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self._process.poll()) is None:
            if not wait_for_end(self._pidfd, _until_look(deadline)):
                if deadline is not None and time.monotonic() >= deadline:
                    raise WaitTimeoutError(f"the command had not ended after {timeout:g} s")
                self._have_runtime_go_on()
        was_killed = self._is_closed and code == -signal.SIGKILL
        if not was_killed and not self._has_begun():  # the runtime writes that down a little later
            said = shorten(self._tail.decode(errors="replace"))
            raise self._explain(said or f"the runtime ended with {code} and said nothing")
        if code == UNKNOWN:
            raise ResourcesError(WHY_UNKNOWN)
        if code < 0:
            self._end_orphan()
        if flaw := self._files.find_flaw(code):
            raise StartError(flaw)
        return code if code >= 0 else 128 - code

    def hang_up(self) -> None:
        """Kill the command if it still runs."""
        code = self._process.poll()
        if code is None:  # not reaped, so its session is its own
            kill_family(self._process.pid, self._pidfd, sessions=True, is_waited_for=True)
        elif code < 0:  # the command has outlived its runtime, which somebody has killed
            self._end_orphan()

    def close(self) -> None:
        """Kill the command if it still runs, and free all."""
        if self._is_closed:
            return
        self._is_closed = True
        self._has_begun()  # its files go, and who waits asks later
        self.hang_up()
        reap(self._process)
        self._poll.close()
        os.close(self._pidfd)
        with self._guard:  # who writes notices soon
            if self._terminal >= 0:
                os.close(self._terminal)
                self._terminal = -1
            self._process.close()
        self._files.remove()


class AttachedSession:
    """The input and output of a container's own program, through its conmon; see `abilities.Session`."""

    def __init__(self, run: RunDirectory, processes: Processes, *, terminal: bool, has_input: bool) -> None:
        self._run, self.has_terminal, self._has_input = run, terminal, has_input
        self._monitor = processes.monitor
        if not is_monitor_alive(processes):
            raise InvalidStateError("its conmon has ended, so nobody can attach to it")
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            directory = os.open(run.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._reach(f"/proc/self/fd/{directory}/attach")  # a path may be longer than an address
            finally:
                os.close(directory)
        except OSError as error:
            self._link.close()
            if is_of_handler(error):
                raise
            raise InvalidStateError(f"its conmon does not answer: {error.strerror}") from error

    def _reach(self, address: str) -> None:
        """Connect. A conmon that was stopped goes on if as many as have room wait for it. Raises OSError."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        look_at = time.monotonic() + LOOK_SECONDS
        self._link.setblocking(False)
        while True:
            try:
                self._link.connect(address)
                break
            except BlockingIOError:
                now = time.monotonic()
                if now > deadline:
                    raise
                if now > look_at:
                    let_monitor_go_on(self._run, self._monitor)
                    look_at = now + LOOK_SECONDS
                time.sleep(_BEGIN_SECONDS)
        self._link.setblocking(True)

    def read(self, timeout: float | None = None) -> Chunk | None:
        """Return what it has written next."""
        if self._link.fileno() < 0:
            raise InvalidStateError("the session is closed")
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if not poll.poll(_until_look(deadline) * 1000):
                if deadline is not None and time.monotonic() >= deadline:
                    raise WaitTimeoutError(f"nothing was written for {timeout:g} s")
                let_monitor_go_on(self._run, self._monitor)
                continue
            try:
                packet = self._link.recv(_PACKET + 1)
            except OSError as error:
                if is_of_handler(error):
                    raise
                return None
            if not packet:
                return None
            if packet[0] in _STREAMS and len(packet) > 1:
                return Chunk(_STREAMS[packet[0]], packet[1:])

    def write(self, data: bytes) -> None:
        """Write to its input; dropped if its config asks for none."""
        for begin in range(0, len(data) if self._has_input else 0, _PACKET):
            if not self._send(data[begin : begin + _PACKET]):
                return

    def _send(self, packet: bytes) -> bool:
        """Send it once conmon takes it; False if conmon takes no more."""
        while True:
            try:
                return bool(self._link.send(packet, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT))
            except BlockingIOError:
                descriptor = self._link.fileno()
                if descriptor < 0:  # another thread has closed it
                    return False
                if not _wait_until_writable(descriptor):
                    let_monitor_go_on(self._run, self._monitor)
            except OSError as error:
                if is_of_handler(error):
                    raise
                return False

    def end_input(self) -> None:
        """Write no more: with `stdin_once` its input ends."""
        if self.has_terminal:
            self.write(_END_OF_TEXT)
        else:
            with suppress(OSError):
                self._link.shutdown(socket.SHUT_WR)

    def resize(self, rows: int, columns: int) -> None:
        """Have conmon give its terminal a size."""
        if self.has_terminal:
            with system_errors_passed_over():
                tell_conmon(self._run, f"1 {clamp(rows)} {clamp(columns)}\n")

    def wait(self, timeout: float | None = None) -> int | None:  # noqa: ARG002
        """Return None: how the container ends, its status tells."""
        return None

    def hang_up(self) -> None:
        """Leave it."""
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Leave it, and free all."""
        self.hang_up()  # who writes notices that
        self._link.close()


def _wait_until_writable(descriptor: int) -> bool:
    """Wait until it takes something, or has nobody who would; False if neither comes before the next look."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(LOOK_SECONDS * 1000))


def _pack(rows: int, columns: int) -> bytes:
    """Return a terminal's size as the kernel takes it."""
    return struct.pack("HHHH", clamp(rows), clamp(columns), 0, 0)


def clamp(count: int) -> int:
    """Return the nearest that a terminal can have."""
    return min(max(count, 0), 0xFFFF)


def tell_conmon(run: RunDirectory, line: str) -> None:
    """Write a line to a conmon's control pipe. Raises OSError if nobody reads it, or if it is no pipe."""
    door = os.open(run.join("ctl"), os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISFIFO(os.fstat(door).st_mode):
            raise OSError(errno.EINVAL, "ctl is no pipe")
        write_to_pipe(door, line.encode())
    finally:
        os.close(door)
