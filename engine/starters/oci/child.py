"""A program that this process runs, and how it ended, whatever the host program beside does with children and signals.

- A fork of the host's, made by another thread while one is begun, would keep the pipes open by which it is begun and
  tells what it does, for as long as that fork lives. So forks wait for a beginning, some milliseconds.
- Who waits for any child takes this one's exit code, and where SIGCHLD is ignored nobody gets it. So it is held by a
  pidfd, by which the kernel tells it nevertheless (Linux 6.15). Before that it is UNKNOWN, and never taken for 0.
- Signals that the host ignores, or blocks in the thread that begins a program, would be ignored and blocked there, too,
  and a runtime hands that on to the container. So they are put back first, by another program, for only that can: where
  the program begins what is the user's, and always if one of them is what a runtime needs.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from limpet.engine.starters.process.interpreter import find_any_interpreter
from limpet.engine.state.descriptors import close_all
from limpet.engine.state.forks import close_hidden, hide, undisturbed
from limpet.recovery.host import has_ended, read_wait_status, wait_for_end

UNKNOWN = 1 << 16
"""The code of one of which nobody can say how it has ended."""
WHY_UNKNOWN = (
    "it has ended, and how is not known: this process has its children waited for elsewhere, or ignores SIGCHLD, and"
    " before Linux 6.15 nothing else tells"
)
_REAPED_SECONDS = 0.5
"""How long the kernel may take from giving an exit code to somebody else until it tells us."""
_PUT_BACK = frozenset(signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ})
"""All but glibc's own two, and those that `subprocess` sees to. Asked for once: each is made an enum anew."""
_others: set[int] = set()
_RESET = """import os, signal, sys
gate = int(sys.argv.pop(1))
if not os.read(gate, 1):
    sys.exit("who has begun it is gone")
os.close(gate)
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
try:
    os.execv(sys.argv[1], sys.argv[1:])
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error.strerror}")
"""


class Child:
    """One, in a session of its own. Thread-safe; close it in the end."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int | IO[bytes],
        environment: Mapping[str, str],
        directory: str = "/",
        pass_fds: Sequence[int] = (),
        is_buffered: bool = True,
        begins_users: bool = False,
    ) -> None:
        """Begin it; `begins_users` says that it begins what is the user's.

        Raises OSError if it cannot be executed, UnsupportedError if what puts signals back is missing.
        """
        self._guard = threading.Lock()
        self._code: int | None = None
        with undisturbed(), _gate(begins_users=begins_users) as (gate, let_go):
            self._process = subprocess.Popen(
                [*(_make_resetter(gate) if gate >= 0 else ()), *command],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=directory,
                env=environment,
                umask=0o022,
                pass_fds=[*pass_fds, *((gate,) if gate >= 0 else ())],
                start_new_session=True,
                bufsize=-1 if is_buffered else 0,
            )
            if self._process.stdin is not None:
                hide(self._process.stdin)
            self.pid, self.pidfd = self._process.pid, -1
            try:
                self.pidfd = os.pidfd_open(self.pid)
                let_go()
            except ProcessLookupError:  # somebody has waited for it already
                _note_others()
                self._end(UNKNOWN)
            except BaseException:
                self._process.kill()
                self._process.wait()
                self._close_streams()
                raise
        self.stdin: IO[bytes] | None = self._process.stdin
        self.stdout: IO[bytes] | None = self._process.stdout
        self.stderr: IO[bytes] | None = self._process.stderr

    def poll(self) -> int | None:
        """Return how it has ended: its code, -N if signal N ended it, or UNKNOWN; None if it has not."""
        with self._guard:
            if self._code is None:
                self._look()
            return self._code

    def _look(self) -> None:
        try:
            found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            _note_others()
            if has_ended(self.pidfd):
                self._end(self._ask_kernel())
            return
        if found is not None:
            self._end(found.si_status if found.si_code == os.CLD_EXITED else -found.si_status)

    def _ask_kernel(self) -> int:
        deadline = time.monotonic() + _REAPED_SECONDS
        while (status := read_wait_status(self.pid, self.pidfd)) is None:
            if time.monotonic() > deadline:
                return UNKNOWN
            time.sleep(0.001)
        return os.waitstatus_to_exitcode(status)

    def _end(self, code: int) -> None:
        self._code = self._process.returncode = code  # so that nobody looks for its pid any more

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended, for so long; say whether it has."""
        return self.poll() is not None or (wait_for_end(self.pidfd, seconds) and self.poll() is not None)

    def kill(self) -> None:
        """Send it SIGKILL, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Free all that it has here. It may be repeated; how it ended is known on."""
        with self._guard:
            self._close_streams()
            close_all([self.pidfd] if self.pidfd >= 0 and self._code is not None else [])
            self.pidfd = self.pidfd if self._code is None else -1

    def close_input(self) -> None:
        """Have its input end, if it is a pipe. May be repeated."""
        if self._process.stdin is not None:
            close_hidden(self._process.stdin)

    def _close_streams(self) -> None:
        self.close_input()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


@contextmanager
def _gate(*, begins_users: bool) -> Iterator[tuple[int, Callable[[], object]]]:
    """Yield what holds a program until it may run, and lets it run; -1 where nothing is to be done before it does.

    That is so unless signals are to be put back, or somebody else waits for children: then it is not begun before it is
    held by its pidfd. It takes as long as a Python does to begin: 15 ms.
    """
    ignored = _read_ignored() & _PUT_BACK
    is_needed = ignored if begins_users else ignored & {signal.SIGCHLD}
    if not (is_needed or _others or signal.pthread_sigmask(signal.SIG_BLOCK, ())):
        yield -1, lambda: None
        return
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        yield read, lambda: os.write(write, b"\0")
    finally:
        close_all((read, write))


def _make_resetter(gate: int) -> Sequence[str]:
    """Return what runs a program, once it is let go, with no signal ignored or blocked. Raises UnsupportedError."""
    return (find_any_interpreter(), "-I", "-S", "-X", "utf8", "-c", _RESET, str(gate))


def _note_others() -> None:
    """Note that somebody else waits for this process's children."""
    _others.add(os.getpid())


def _read_ignored() -> set[int]:
    """Return the signals that this process ignores (proc_pid_status(5)), also by what is not Python."""
    with open("/proc/self/status", "rb") as file:
        bits = next((int(line.split()[1], 16) for line in file if line.startswith(b"SigIgn:")), 0)
    return {number for number in range(1, 65) if bits >> (number - 1) & 1}
