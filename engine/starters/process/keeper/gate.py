"""The gate: what a container's process is before it is the container's program.

It is forked from the keeper and held. The engine writes its identity to disk and then opens the gate; if engine or
keeper dies first, the gate closes, and the process ends without having run a line of the user's program. Otherwise it
becomes what the plan says and executes the program in its own place, so that pid, start time and pidfd inode stay
those that were written down.
"""

import errno
import fcntl
import json
import os
import resource
import signal
import socket
from contextlib import suppress
from typing import Any, NoReturn

from .kernel import name_process, unshare
from .root import become_user, enter_root

NOT_EXECUTED = 128
"""The exit code of a process that did not get as far as the program."""
COMMAND_NAME = "limpet-gate"
"""As /proc/PID/comm shows it."""
_GATE, _REPORT, _PLAN = 3, 4, 5
_FIRST_FREE = 10
_CLONE_NEWUTS = 0x04000000
_UMASK = 0o022
_DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"


def become_container(plan: int, gate: int, report: int, streams: tuple[int, int]) -> NoReturn:
    """Turn this process, just forked, into a container's. Never returns.

    `plan` holds JSON, see `root`. One byte from `gate` opens it, end of file closes it. `report` is closed by a
    successful exec; what is written to it is why there was none. `streams` become standard output and error.
    """
    told = report
    try:
        os.setsid()
        _take_descriptors(plan, gate, report, streams)
        told = _REPORT
        _forget_the_keeper()
        _read_plan_and_execute()
    except BaseException as error:  # noqa: BLE001  # whatever it is: what is not reported is not known
        name = getattr(error, "filename", None)
        name = os.fsdecode(name) if isinstance(name, bytes) else name
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        with suppress(OSError):
            os.write(told, (f"{name!r}: {reason}" if name else reason).encode(errors="replace")[:4000])
    finally:
        os._exit(NOT_EXECUTED)


def _read_plan_and_execute() -> None:
    document: dict[str, Any] = json.loads(os.pread(_PLAN, os.fstat(_PLAN).st_size, 0))
    if document["own_uts_namespace"]:
        with suppress(OSError):  # by which descendants are told; without it, by their session
            unshare(_CLONE_NEWUTS)
            if document["hostname"]:
                socket.sethostname(document["hostname"])
    if os.read(_GATE, 1) != b"g":
        return
    enter_root(document)
    soft, hard = document["nofile"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    become_user(document)
    _execute(
        [_to_bytes(each) for each in document["args"]],
        dict(_to_bytes(entry).split(b"=", 1) for entry in document["env"]),
    )


def _take_descriptors(plan: int, gate: int, report: int, streams: tuple[int, int]) -> None:
    """Have 0 to 5 and nothing else: not the keeper's lock, not its connections, not the pipes of other gates."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    given = (null, *streams, gate, report, plan)
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE) for each in given]
    for number, each in enumerate(high):
        os.dup2(each, number, inheritable=number < _GATE)
    os.closerange(len(high), 1 << 30)  # one close_range(2)


def _forget_the_keeper() -> None:
    """Have the signals, the umask, the name and the oom score of a new process, not the keeper's.

    Handlers go with the exec; what is ignored stays so, and is only what the keeper and Python itself ignore.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(_UMASK)
    name_process(COMMAND_NAME)
    with suppress(OSError):  # a score that the keeper was given may not be lowered
        file = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(file, b"0")
        os.close(file)


def _to_bytes(text: str) -> bytes:
    """Return what the plan's text stands for, whatever the locale."""
    return text.encode("utf-8", "surrogateescape")


def _execute(args: list[bytes], environment: dict[bytes, bytes]) -> None:
    """Execute the program, looked for in the environment's PATH as execvp(3) does. Raises OSError.

    Not os.execvpe: that imports modules when it is called, which the new root directory does not have.
    """
    name = args[0]
    places = [b""] if b"/" in name else environment.get(b"PATH", _DEFAULT_PATH).split(b":")
    problem: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for place in places:
        try:
            os.execve(os.path.join(place, name), args, environment)  # noqa: S606  # a shell is what it must not be
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            problem = error  # somewhere else it may be executable
    problem.filename = os.fsdecode(name)
    raise problem
