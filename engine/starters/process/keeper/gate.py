"""The gate: what a container's process is before it is the container's program.

It is forked from the keeper, often before anybody asks for it (see `spare`), handed a plan, and held. The engine writes
its identity to disk and then opens the gate. If the engine dies first, the gate closes, and the process ends without
having run a line of the user's program; if the keeper does, the kernel kills it. Otherwise it becomes what the plan
says and executes the program in its own place, so that pid, start time and pidfd inode stay those that were written
down.
"""

import errno
import fcntl
import json
import os
import resource
import signal
import socket
import time
from contextlib import suppress
from typing import Any, NoReturn

from .kernel import (
    close_from,
    end_with_parent,
    hold_memory,
    leave_session_keyring,
    name_process,
    outlive_parent,
    unshare,
)
from .messages import lent, receive
from .root import become_user, enter_root, enter_view

NOT_EXECUTED = 128
"""The exit code of a process that did not get as far as the program."""
SPARE_NAME, COMMAND_NAME, MEMORY_NAME = "limpet-spare", "limpet-gate", "limpet-memory"
"""As /proc/PID/comm shows it: before it is a container's, from then on, and what holds its memory."""
_CONTROL = 3
_UNTIL = _REPORT = 4  # first the one, and once it is a container's the other
_PLAN = 5
_FIRST_FREE = 10
EXECUTES = 1
"""The offset of the plan from when the program is about to be executed; before it is 0."""
_CLONE_NEWUTS = 0x04000000
_UMASK = 0o022
_DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"
_BUSY_SECONDS, _BUSY_AGAIN_SECONDS = 1.0, 0.005


def is_of_program(wait_status: int) -> bool:
    """Say whether a process that ended so had executed its program: at its gate it ends by a signal or NOT_EXECUTED."""
    return os.WIFEXITED(wait_status) and os.WEXITSTATUS(wait_status) != NOT_EXECUTED


def become_container(control: int, until: int) -> NoReturn:
    """Turn this process, just forked, into a container's. Never returns.

    `control` is a socket: a message with four descriptors makes it a container's: the plan (JSON, see `root`), what
    becomes standard output and error, and a pipe for its report, which a successful exec closes; what is written to it
    is why there was none. Whoever has the plan shares its offset, and sees there whether it came to the exec at all,
    whatever ends us, and whoever reaps us. Two more descriptors are what `enter_view` takes. End of file from us says
    that all is done that can be done at the gate. A message "g" opens it, end of file closes it. Unless `until` is -1,
    its memory is held until the other end of that pipe is closed.
    """
    told = -1  # until they are its own, its numbers are the keeper's
    try:
        end_with_parent()  # one that is stopped just then would see no end of file, and nobody would continue it
        _take_descriptors(control, until)
        told = _REPORT
        _forget_the_keeper()
        if until >= 0:
            name_process(MEMORY_NAME)
            hold_memory(_UNTIL)
        plan = _receive_plan()
        if plan is not None:
            _obey_plan(*plan)
    except BaseException as error:  # noqa: BLE001  # whatever it is: what is not reported is not known
        name = getattr(error, "filename", None)
        name = os.fsdecode(name) if isinstance(name, bytes) else name
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        with suppress(OSError):
            os.write(told, (f"{name!r}: {reason}" if name else reason).encode(errors="replace")[:4000])
    finally:
        os._exit(NOT_EXECUTED)


def _receive_plan() -> tuple[dict[str, Any], str] | None:
    """Wait until it is some container's; return its plan, None at the end. Its streams are taken, and its view.

    With the plan goes what is to be said of a file that is not there: empty where its engine sees the same files.
    """
    name_process(SPARE_NAME)
    with lent(_CONTROL) as link:
        _, given = receive(link)
    if not given:
        return None
    os.setsid()  # only now: until it is a container's it is told by the keeper's session, as what holds its memory is
    name_process(COMMAND_NAME)
    plan, *streams, report = given[:4]
    os.dup2(report, _REPORT, inheritable=False)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
    plan = fcntl.fcntl(plan, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    document: dict[str, Any] = json.loads(os.pread(plan, os.fstat(plan).st_size, 0))
    hint = _enter_view(given[4:])
    os.dup2(plan, _PLAN, inheritable=False)
    close_from(_PLAN + 1)
    return document, hint


def _enter_view(view: list[int]) -> str:
    """See the files that the engine sees; return what is to be said where that is refused, and one is missed."""
    try:
        if view:
            enter_view(*view)
    except OSError as error:
        return (
            f" for its keeper, process {os.getppid()}, whose mounts or root directory are not those of the engine"
            f" (setns: {error.strerror}): run as root; or end the containers and close the engine, then the next has"
            " its own keeper"
        )
    return ""


def _obey_plan(document: dict[str, Any], hint: str) -> None:
    try:
        _become_program(document)
    except FileNotFoundError as error:
        error.strerror = f"{error.strerror}{hint}"
        raise


def _become_program(document: dict[str, Any]) -> None:
    if document["own_uts_namespace"]:
        with suppress(OSError):  # by which descendants are told; where it has none, by their session
            unshare(_CLONE_NEWUTS)
            if document["hostname"]:
                socket.sethostname(document["hostname"])
    args = [_to_bytes(each) for each in document["args"]]
    environment = dict(_to_bytes(entry).split(b"=", 1) for entry in document["env"])
    problem = None
    try:
        enter_root(document)
        _take_over(document)
    except BaseException as error:  # noqa: BLE001  # told once the gate is open: until then there is to be a process
        problem = error
    _say_ready()
    if os.read(_CONTROL, 1) != b"g":  # what comes after this is waited for
        raise OSError(errno.ECANCELED, "its gate was closed before its program was executed")
    if problem is not None:
        raise problem
    fcntl.fcntl(_CONTROL, fcntl.F_SETFL, 0)  # nothing continues the program: what holds our memory holds this, too
    outlive_parent()
    become_user(document)  # only now: while it is held, none of that user's processes may signal it
    os.lseek(_PLAN, EXECUTES, os.SEEK_SET)
    _execute(args, environment)


def _say_ready() -> None:
    """Let the keeper see the end of what comes from us. No message: one that is left unread would reset the socket."""
    with lent(_CONTROL) as link:
        link.shutdown(socket.SHUT_WR)


def _take_over(document: dict[str, Any]) -> None:
    """Have what a child of the engine has, as far as the keeper may give it: one with less may have begun it."""
    for number, soft, hard in ((resource.RLIMIT_NOFILE, *document["nofile"]), *document.get("limits", ())):
        try:
            resource.setrlimit(number, (soft, hard))
        except ValueError:  # it may not be raised
            _, most = resource.getrlimit(number)
            resource.setrlimit(number, (soft if 0 <= soft < most else most, most))
    scheduling = document.get("scheduling")  # an engine of an older version tells none
    if scheduling:
        with suppress(OSError):
            os.sched_setaffinity(0, scheduling["cpus"])
        with suppress(OSError):
            os.sched_setscheduler(0, scheduling["policy"], os.sched_param(scheduling["priority"]))
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, scheduling["nice"])


def _take_descriptors(control: int, until: int) -> None:
    """Have 0 to 4 and nothing else: not the keeper's lock, not its connections, not what leads to other gates.

    What is the keeper's goes first: it may have left us no number.
    """
    first = 0
    for each in sorted({control, until} - {-1}):
        if first < each:
            close_from(first, each - 1)
        first = each + 1
    close_from(first)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    taken = (null, null, null, control, null if until < 0 else until)
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE) for each in taken]
    for number, each in enumerate(high):
        os.dup2(each, number, inheritable=number < _CONTROL)
    close_from(len(high))


def _forget_the_keeper() -> None:
    """Have the signals, the umask and the keyring of a new process, not the keeper's; the oom score is seen to by it.

    Handlers go with the exec; what is ignored stays so, and is only what the keeper and Python itself ignore.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(_UMASK)
    if os.geteuid() == 0:  # an ordinary user may have 200 keys, and its containers share the keeper's empty keyring
        leave_session_keyring()


def _to_bytes(text: str) -> bytes:
    """Return what the plan's text stands for, whatever the locale."""
    return text.encode("utf-8", "surrogateescape")


def _execute(args: list[bytes], environment: dict[bytes, bytes]) -> None:
    """Execute the program, looked for in the environment's PATH as execvp(3) does. Raises OSError.

    Not os.execvpe: that imports modules when it is called, which the new root directory does not have. One that is
    open for writing is tried again: a fork of who has just made it holds it until it executes something, or ends.
    """
    name = args[0]
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        problem = _try_to_execute(name, args, environment)
        if problem.errno != errno.ETXTBSY or time.monotonic() > deadline:
            problem.filename = os.fsdecode(name)
            raise problem
        time.sleep(_BUSY_AGAIN_SECONDS)


def _tell_mount(problem: OSError, path: bytes) -> None:
    """Tell whether it is the mount that keeps a program from being executed: nothing of its file shows that."""
    with suppress(OSError):
        if os.statvfs(path).f_flag & os.ST_NOEXEC:
            problem.strerror = f"{problem.strerror}: its file system is mounted noexec"


def _try_to_execute(name: bytes, args: list[bytes], environment: dict[bytes, bytes]) -> OSError:
    """Return what keeps it from being executed."""
    places = [b""] if b"/" in name else environment.get(b"PATH", _DEFAULT_PATH).split(b":")
    problem: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for place in places:
        try:
            os.execve(os.path.join(place, name), args, environment)  # noqa: S606  # a shell is what it must not be
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            problem = error  # somewhere else it may be executable
            _tell_mount(problem, os.path.join(place, name))
        except OSError as error:
            return error
    return problem
