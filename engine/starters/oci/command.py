"""Runs a program to its end, with a deadline and with no more of its output kept than was asked for."""

import os
import re
import selectors
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from limpet.engine.starters.oci.child import UNKNOWN, WHY_UNKNOWN, Child
from limpet.engine.starters.oci.exhausted import name_exhausted
from limpet.engine.starters.oci.family import have_go_on, kill_family
from limpet.engine.state.pipes import write_to_pipe
from limpet.schema.errors import escape

_OUTPUT_BYTES = 64 << 10
_CRASHES = ("fatal error:", "panic:", "runtime/cgo:", "runtime:")
"""How a line begins after which a program written in Go, such as runc, writes pages of where it was."""
_NSEXEC = re.compile(r'.*\blevel=fatal msg="nsexec-\d+\[\d+\]: (.*)')
"""What runc's own beginnings say, which are no Go: what comes after is that they have ended."""
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_STAMP = re.compile(r"^([A-Z]{4}\[\d+\] *|\d{4}-\d\d-\d\dT[\d:.]+Z: *)+")
"""What runc and crun begin a line with on a terminal."""
_DRAIN_SECONDS = 0.5
"""How long to read on once the program has ended, where somebody else still holds its output open."""


_END_SECONDS = 5.0
"""How long one that was killed may take to end: it does not while it hangs in the kernel, or is frozen."""
_unreaped: list[Child] = []
"""Those that have not ended by then."""
LOOK_SECONDS = 1.0
"""Between two looks whether what says nothing was stopped by a signal."""


class Outcome(NamedTuple):
    """How a program ended."""

    code: int | None
    """None if it was killed at the deadline, -N if signal N ended it, UNKNOWN if nobody can say (see `child`)."""
    output: bytes
    error: bytes
    is_cut: bool = False
    """True if it wrote more than was kept."""

    @property
    def problem(self) -> str:
        """Say what went wrong, in one line, from what it wrote last."""
        said = shorten(self.error.decode(errors="replace"))
        if self.code is None:
            return f"it did not end in time and was killed{f' ({said})' if said else ''}"
        if self.code == UNKNOWN:
            return f"{WHY_UNKNOWN}{f' ({said})' if said else ''}"
        return said or f"it ended with {self.code} and said nothing"


def shorten(text: str) -> str:
    """Return the line of what a runtime says that tells what is wrong, without its time and level: mostly the last.

    Of a document that it cannot read, crun shows where below the error, in lines that are indented. What has run out
    is named, with what to do.
    """
    written = _COLOR.sub("", text).split("\n")
    lines = [line for each in written if (line := _STAMP.sub("", each.strip())) and not each.startswith(" ")]
    lines = lines or [line for each in written if (line := _STAMP.sub("", each.strip()))]
    line = next((each for each in lines if each.startswith(_CRASHES)), lines[-1] if lines else "")
    _, found, message = line.partition('msg="')
    if begun := next(filter(None, map(_NSEXEC.fullmatch, lines)), None):
        found, message = "nsexec", begun[1]
    said = escape(message.removesuffix('"').replace('\\"', '"') if found else line)[-500:]
    return name_exhausted(said)


def clean_environment() -> Mapping[str, str]:
    """Return what programs get of this process's environment: where other programs are."""
    return {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def run(
    command: Sequence[str],
    *,
    timeout: float,
    most_bytes: int = _OUTPUT_BYTES,
    directory: str = "/",
    pass_fds: Sequence[int] = (),
    given: bytes = b"",
    environment: Mapping[str, str] | None = None,
    begin: Callable[[int], None] | None = None,
    see_to: Callable[[int], None] = have_go_on,
    begins_users: bool = False,
) -> Outcome:
    """Run a program in a session of its own, and in a directory, and return how it ended.

    After `timeout` seconds it is killed with what it has started, and not waited for much longer if it does not end.
    `given` is its input, and `environment` its own, if it is to have another than `clean_environment`. With `begin`,
    which is called with its pid, it gets its input once that has returned, and none if this process is killed before.
    `see_to` is called with its pid whenever it has said nothing for a second, and before it is killed; `begins_users`
    says that it begins what is the user's.
    Raises OSError if it cannot be executed, and what `begin` raises.
    """
    source = os.memfd_create("input", os.MFD_CLOEXEC) if given else os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if given and begin is None:
            with open(source, "wb", closefd=False) as file:
                file.write(given)
            os.lseek(source, 0, os.SEEK_SET)
        process = Child(
            command,
            stdin=source if begin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            directory=directory,
            environment=clean_environment() if environment is None else environment,
            pass_fds=pass_fds,
            begins_users=begins_users,
        )
    finally:
        os.close(source)
    try:
        if begin is not None:
            begin(process.pid)
        output, error, is_cut = _read(process, time.monotonic() + timeout, most_bytes, given, see_to)
        if process.poll() is None:
            see_to(process.pid)
        code = process.poll()
    finally:
        if process.poll() is None:  # not reaped, so its session is its own
            kill_family(process.pid, process.pidfd, sessions=True, is_waited_for=True)
            reap(process)
        process.close()
    return Outcome(code, output, error, is_cut)


def reap(process: Child) -> None:
    """Wait until a child that was killed has ended; one that does not do so in time is reaped after a later call."""
    for each in [*_unreaped]:
        if each.poll() is not None:
            each.close()
            with suppress(ValueError):  # another thread has found it, too
                _unreaped.remove(each)
    if not process.wait(_END_SECONDS):
        _unreaped.append(process)


def is_any_left() -> bool:
    """Say whether one that was killed has not ended yet, and may go on with what it was to do."""
    return any(each.poll() is None for each in [*_unreaped])


def _read(
    process: Child, deadline: float, most_bytes: int, given: bytes, see_to: Callable[[int], None]
) -> tuple[bytes, bytes, bool]:
    """Read what the program writes until it has ended; what is more than `most_bytes` is read and dropped.

    Its input is written to it if that is a pipe.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    kept = {process.stdout: bytearray(), process.stderr: bytearray()}
    is_cut = False
    with selectors.DefaultSelector() as selector:
        is_over = process.pidfd < 0
        deadline = min(deadline, time.monotonic() + _DRAIN_SECONDS) if is_over else deadline
        for source in (*kept, *(() if is_over else (process.pidfd,))):
            selector.register(source, selectors.EVENT_READ)
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while selector.get_map() and (now := time.monotonic()) < deadline:
            ready = selector.select(min(deadline - now, LOOK_SECONDS))
            if not ready:
                see_to(process.pid)
            for key, _ in ready:
                if key.fd == process.pidfd:
                    selector.unregister(process.pidfd)
                    deadline = min(deadline, time.monotonic() + _DRAIN_SECONDS)
                    continue
                if process.stdin is not None and key.fileobj is process.stdin:
                    given = _write_some(key.fd, given)
                    if not given:
                        selector.unregister(process.stdin)
                        process.close_input()
                    continue
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fileobj)
                data = kept[key.fileobj]  # type: ignore[index]
                is_cut = is_cut or len(data) + len(chunk) > most_bytes
                data += chunk[: most_bytes - len(data)]
    return bytes(kept[process.stdout]), bytes(kept[process.stderr]), is_cut


def _write_some(descriptor: int, data: bytes) -> bytes:
    """Write what a pipe takes; return what is left, nothing if nobody reads any more."""
    try:
        return data[write_to_pipe(descriptor, data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""
