"""A process stopped at every system call that changes files: seccomp user notification, through ctypes alone.

Needs Linux 5.19 or newer (so that no signal wakes a stopped process) on x86_64 or aarch64, but no root, compiler or
ptrace. The process, its threads and all its descendants are stopped at the calls in `syscalls.CALLS`, one event at a
time; the caller lets the call go, fails it, answers it, or kills. Everything the process does after the filter is in
place is seen, in one order. no_new_privs is set: set-uid programs that it starts do not get their privileges.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final, Self

from limpet.schema.errors import LimpetError, UnsupportedError
from limpet.testing import syscalls
from limpet.testing.process import Process, libc, read_failure, start

_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags, seccomp_data
_RESPONSE: Final = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, val, error, flags
_ADD_DESCRIPTOR: Final = struct.Struct("=QIIII")  # struct seccomp_notif_addfd: id, flags, srcfd, newfd, flags
_RECEIVE: Final = 0xC0502100
_SEND: Final = 0xC0182101
_IS_VALID: Final = 0x40082102
_ADD: Final = 0x40182103
_SET_FLAGS: Final = 0x40082104
_CONTINUE: Final = 1
_AT_THIS_NUMBER: Final = 1
_ADD_AND_SEND: Final = 2
_PR_SET_NO_NEW_PRIVS: Final = 38
_SET_MODE_FILTER: Final = 1
_NEW_LISTENER: Final = 1 << 3
_WAIT_KILLABLE: Final = 1 << 5  # only a fatal signal wakes a stopped process
_PLACE: Final = struct.Struct("=ii")  # pid, and the number that the listener gets
_LOOK_AGAIN_SECONDS: Final = 0.0005
_KEPT_PIDFDS: Final = 64
"""For the threads most recently stopped for the first time: a life may have any number of short processes."""


class _Program(ctypes.Structure):  # struct sock_fprog
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class HungError(LimpetError):
    """The supervised process exceeded its time and was killed."""


class Event:
    """One system call at which a thread is stopped: its name and its six arguments."""

    __slots__ = ("_supervisor", "arguments", "id", "name", "pid")

    def __init__(self, supervisor: "Supervisor", notification: bytes | bytearray) -> None:
        self.id, self.pid, _, number, architecture, _, *arguments = _NOTIFICATION.unpack(notification)
        native = architecture == supervisor.audit_architecture
        self.name = supervisor.names.get(number, syscalls.FOREIGN) if native else syscalls.FOREIGN
        self.arguments: list[int] = arguments
        self._supervisor = supervisor

    def read(self, address: int, size: int) -> bytes:
        """Return `size` bytes of the process's memory.

        Raises OSError if there is none, and UnsupportedError if the kernel denies access.
        """
        try:
            memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise UnsupportedError(
                f"cannot read what process {self.pid} writes: it has other privileges than this one, "
                "or ptrace is restricted (see kernel.yama.ptrace_scope)"
            ) from error
        try:
            return os.pread(memory, size, address)
        finally:
            os.close(memory)

    def read_string(self, address: int) -> str:
        """Return the NUL-terminated text at `address`. Raises OSError if there is none."""
        text = b""
        while b"\0" not in text:  # never across a page boundary: the next page may not be mapped
            text += self.read(address + len(text), 4096 - (address + len(text)) % 4096)
        return os.fsdecode(text[: text.index(0)])

    def descriptor(self, number: int) -> int:
        """Return a duplicate, ours to close, of the process's descriptor `number`.

        Raises OSError if it has none, and UnsupportedError if the kernel denies access.
        """
        return self._supervisor.duplicate(self.pid, number)


class Supervisor:
    """Runs `function` in a separate family, stopped at every call that changes files; a context manager.

    Iterate events() and answer each event once. Raises UnsupportedError if the kernel does not support it.
    """

    def __init__(
        self,
        function: Callable[[], None],
        *,
        deadline_seconds: float = 60.0,
        stops: syscalls.Stops = syscalls.FILE_CHANGES,
    ) -> None:
        architecture = _architecture()
        program = syscalls.filter_program(architecture, stops)
        self.audit_architecture = syscalls.AUDIT_ARCHITECTURES[architecture]
        self.names = {number: name for name, number in stops.numbers(architecture).items()}
        self.killed = False
        self.pid = 0
        """The process that runs the function."""
        self._failure = ""
        self._left_seconds = deadline_seconds
        self._deadline_seconds = deadline_seconds
        self._pidfds: dict[int, int] = {}
        self._family = start(functools.partial(_install_and_run, function, program))
        try:
            self._listener, self.pid, theirs = _receive_listener(self._family.report)
        except BaseException:
            self._family.close()
            raise
        self._family.report.send(b"t")
        if "close" in stops.table:
            self._let_begin(theirs)
        with contextlib.suppress(OSError):  # Linux 6.6: wake up on the same CPU; faster, never needed
            fcntl.ioctl(self._listener, _SET_FLAGS, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def status(self) -> int | None:
        """How the process ended (negative: the signal); None while it runs."""
        return self._family.status

    def failure(self) -> str:
        """Return the traceback of the exception that ended the function, or an empty string."""
        self._failure = self._failure or read_failure(self._family)
        return self._failure

    def events(self) -> Iterator[Event]:
        """Yield each call in the order in which they are stopped, until the process has ended.

        Its descendants may live on, unanswered, until close() or `events_beside`. Raises HungError if the process has
        run longer than its deadline, not counting the time in which events are handled; it is then killed.
        """
        return self._events(self._family)

    def events_beside(self, other: Process, deadline_seconds: float) -> Iterator[Event]:
        """Yield the calls of what the process has left behind, until `other`, which is not supervised, has ended.

        Raises HungError, and kills `other`, if that takes longer than the deadline.
        """
        self._left_seconds = self._deadline_seconds = deadline_seconds
        return self._events(other)

    def _events(self, awaited: Process) -> Iterator[Event]:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(awaited, select.POLLIN)
        notification = bytearray(_NOTIFICATION.size)
        while not self.killed:
            ready = self._poll(poll, awaited)
            if awaited.fileno() in ready:
                awaited.wait()
                return
            if ready.get(self._listener, 0) & select.POLLIN:
                notification[:] = bytes(_NOTIFICATION.size)
                try:
                    fcntl.ioctl(self._listener, _RECEIVE, notification)
                except (FileNotFoundError, InterruptedError):  # it was killed or interrupted meanwhile
                    continue
                yield Event(self, notification)
            elif ready.get(self._listener, 0) & select.POLLHUP:
                poll.unregister(self._listener)

    def is_waiting(self, event: Event) -> bool:
        """Return whether the call still waits for its answer; if so, what was read of the process is its own."""
        try:
            fcntl.ioctl(self._listener, _IS_VALID, struct.pack("=Q", event.id))
        except FileNotFoundError:
            return False
        return True

    def let_go(self, event: Event) -> None:
        """Let the kernel do the call. If nothing waits for it any more, nothing happens, here and below."""
        self._send(event, 0, 0, _CONTINUE)

    def fail(self, event: Event, error: int) -> None:
        """Fail the call with this errno, without doing it."""
        self._send(event, 0, -error, 0)

    def answer(self, event: Event, value: int) -> None:
        """Return `value` from the call, without doing it."""
        self._send(event, value, 0, 0)

    def answer_descriptor(self, event: Event, descriptor: int, *, close_on_exec: bool) -> None:
        """Return a duplicate of our `descriptor` from the call, as its lowest free one, or fail it with EMFILE."""
        flags = os.O_CLOEXEC if close_on_exec else 0
        request = _ADD_DESCRIPTOR.pack(event.id, _ADD_AND_SEND, descriptor, 0, flags)
        try:
            fcntl.ioctl(self._listener, _ADD, request)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            self.fail(event, errno.EMFILE)

    def replace_descriptor(self, event: Event, number: int, descriptor: int) -> None:
        """Have the process's descriptor `number` closed, and stand for what our `descriptor` does; answers nothing."""
        request = _ADD_DESCRIPTOR.pack(event.id, _AT_THIS_NUMBER, descriptor, number, os.O_CLOEXEC)
        with contextlib.suppress(FileNotFoundError):
            fcntl.ioctl(self._listener, _ADD, request)

    def kill(self) -> None:
        """SIGKILL the process and wait until it is gone. Its descendants live until close()."""
        self.killed = True
        self._family.kill()

    def close(self) -> None:
        """End the process and all its descendants, and wait until they are gone."""
        self._family.close()
        for descriptor in (self._listener, *self._pidfds.values()):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._pidfds.clear()
        self._listener = -1

    def duplicate(self, thread: int, number: int) -> int:
        """Return a duplicate of the descriptor `number` of the process of `thread`. Raises OSError."""
        for _ in range(2):
            pidfd = self._pidfds.get(thread)
            if pidfd is None:
                if len(self._pidfds) >= _KEPT_PIDFDS:
                    os.close(self._pidfds.pop(next(iter(self._pidfds))))
                pidfd = self._pidfds[thread] = os.pidfd_open(_process_of(thread))
            try:
                return _take_descriptor(pidfd, thread, number)
            except ProcessLookupError:
                os.close(self._pidfds.pop(thread))  # of a thread that died and whose id was reused
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def _let_begin(self, listener: int) -> None:
        """Let the process go on until it has closed its own descriptor of the listener: that is not the function's."""
        for event in self.events():
            self.let_go(event)
            if event.name == "close" and event.arguments[0] == listener:
                return

    def _poll(self, poll: select.poll, awaited: Process) -> dict[int, int]:
        started = time.monotonic()
        ready = poll.poll(max(0.0, self._left_seconds) * 1000)
        self._left_seconds -= time.monotonic() - started
        if not ready:
            self.killed = True
            awaited.kill()
            raise HungError(f"the supervised process did not finish in {self._deadline_seconds:g} s; killed")
        return dict(ready)

    def _send(self, event: Event, value: int, error: int, flags: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # it was killed meanwhile
            fcntl.ioctl(self._listener, _SEND, _RESPONSE.pack(event.id, value, error, flags))


def _process_of(thread: int) -> int:
    with open(f"/proc/{thread}/status", "rb") as file:
        return int(next(line for line in file if line.startswith(b"Tgid:")).split()[1])


def _architecture() -> str:
    machine = syscalls.machine()
    if not sys.platform.startswith("linux") or machine not in syscalls.AUDIT_ARCHITECTURES:
        known = " and ".join(syscalls.AUDIT_ARCHITECTURES)
        raise UnsupportedError(f"crash tests need Linux on {known}; this is {sys.platform} on {machine}")
    return machine


def _install_and_run(function: Callable[[], None], program: bytes, report: socket.socket) -> None:
    """Put this process under the filter, once the supervisor knows where it finds the listener, and run.

    Nothing has to be sent after the filter is in place: that could be stopped by it, and nobody would answer.
    """
    listener = os.dup(report.fileno())  # the lowest number that is free: the listener's
    os.close(listener)
    report.send(_PLACE.pack(os.getpid(), listener))
    try:
        _install(program)
    except OSError as error:
        report.send(f"{error.strerror}".encode())
        return
    report.recv(1)
    os.close(listener)
    function()


def _install(program: bytes) -> int:
    fprog = _Program(len(program) // 8, program)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs is refused")
    number = syscalls.SECCOMP_NUMBERS[syscalls.machine()]
    listener: int = libc.syscall(number, _SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE, ctypes.byref(fprog))
    if listener < 0:
        error = ctypes.get_errno()
        reason = "it needs Linux 5.19" if error == errno.EINVAL else os.strerror(error)
        raise OSError(error, f"seccomp user notification: {reason}")
    return listener


def _receive_listener(report: socket.socket) -> tuple[int, int, int]:
    """Take the listener from the process; return ours, whose it was, and its number there. Raises UnsupportedError."""
    place = report.recv(4096)
    if len(place) != _PLACE.size:
        raise _refuse(place)
    pid, number = _PLACE.unpack(place)
    name = f"/proc/{pid}/fd/{number}"
    try:
        pidfd = os.pidfd_open(pid)
        try:
            while not _is_told(report, _LOOK_AGAIN_SECONDS):
                with contextlib.suppress(FileNotFoundError):
                    if "seccomp" in os.readlink(name):
                        return _take_descriptor(pidfd, pid, number), pid, number
        finally:
            os.close(pidfd)
    except OSError as error:
        if not _is_told(report, 0):  # it may have been refused, have said so, and be gone already
            raise _refuse(str(error).encode()) from error
    raise _refuse(report.recv(4096))


def _is_told(report: socket.socket, seconds: float) -> bool:
    return bool(select.select([report], [], [], seconds)[0])


def _take_descriptor(pidfd: int, thread: int, number: int) -> int:
    """Return a duplicate of another process's descriptor. Raises UnsupportedError if the kernel denies it, OSError."""
    descriptor: int = libc.syscall(syscalls.PIDFD_GETFD, pidfd, number, 0)
    if descriptor < 0:
        error = ctypes.get_errno()
        if error == errno.EPERM:
            raise UnsupportedError(f"the files of process {thread} cannot be seen: {os.strerror(error)}")
        raise OSError(error, os.strerror(error))
    return descriptor


def _refuse(said: bytes) -> UnsupportedError:
    reason = said.decode(errors="replace") or "the process ended before its filter was in place"
    return UnsupportedError(f"this system cannot stop a process at its system calls: {reason}")
