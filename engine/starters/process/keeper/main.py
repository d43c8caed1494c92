"""The keeper's processes, and how they begin.

anchor   asleep; the parent of keeper and copier, and a child subreaper: when the keeper dies, its children, zombies
         included, become the anchor's, which then becomes the keeper
keeper   the parent of every container's first process, and of what these leave behind
copier   copies the containers' output to their logs; a log on a disk that hangs makes only this one hang
"""

import fcntl
import os
import resource
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import NoReturn

from .copies import Copies
from .keeper import Keeper
from .kernel import (
    become_subreaper,
    close,
    close_from,
    give_up_other_ids,
    leave_session_keyring,
    name_process,
    read_stat,
    reset_inherited,
    reset_internal_signals,
)
from .listener import find_file, listen, listen_again

LOCK = "lock"
DIRECTORY = 3
"""The descriptor that it is given: the keeper's own directory."""
ANOTHER_LIVES = 3
"""The exit status if another keeper holds the lock."""
KILLED = 4
"""The same if the anchor ended without a word."""
_OOM_SCORES = ("-900", "0")
"""The first that may be set: below 0 needs CAP_SYS_RESOURCE, and the host's own may make it the first to be killed."""
_RAISED = (
    resource.RLIMIT_AS,
    resource.RLIMIT_CPU,
    resource.RLIMIT_DATA,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_NOFILE,
)
"""Limits that would keep it from its work; containers have those of their engine."""
_MOST_CPUS = 8192
"""That Linux can be built for."""
_BEGUN = b"+"
_TOLD_SECONDS = 1.0
_LONGEST_REASON = 4000
_PAUSE_SECONDS = 0.2
"""After so long what was stopped goes on: somebody may stop it again and again."""


def main() -> None:
    """Begin: the process that was spawned ends once the anchor serves. Its exit status is 0 if one does."""
    close_from(DIRECTORY + 1)
    os.chdir("/")
    os.umask(0o022)
    give_up_other_ids()
    leave_session_keyring()
    lock = _take_lock()
    if lock < 0:
        sys.exit(ANOTHER_LIVES)
    _require_proc()
    _require_executed_flag()
    listener = listen(DIRECTORY)
    reset_internal_signals()
    reset_inherited()
    # SIGTERM goes to all there is when a unit or the machine is stopped: who witnesses ends stays until these are over.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    _take_what_it_may_have()
    _take_oom_score()
    begun, told = os.pipe2(os.O_CLOEXEC)
    if not os.fork():
        close(begun)
        os.dup2(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), 2)  # until now it went to who spawned us
        _anchor(listener, told)
    os.close(told)
    _require_begun(begun)


def _require_begun(begun: int) -> None:
    """Exit with what has kept the keeper from serving. One that takes its time is waited for by its engine."""
    poll = select.poll()
    poll.register(begun, select.POLLIN)
    if poll.poll(_TOLD_SECONDS * 1000) and (why := os.read(begun, _LONGEST_REASON)) != _BEGUN:
        sys.exit(why.decode(errors="replace") or KILLED)


def _anchor(listener: socket.socket, told: int) -> NoReturn:
    try:
        become_subreaper()
        anchor, made = os.getpid(), find_file(DIRECTORY)
        copies = Copies(DIRECTORY)
        keeper = os.fork()
        if keeper:
            close(told)
            told = -1
            name_process("limpet-anchor")
            if _has_finished(keeper, copies.pid):
                os._exit(0)
        else:
            become_subreaper()
        name_process("limpet-keeper")
        listener = listen_again(listener, DIRECTORY, made)
        served = Keeper(DIRECTORY, listener, anchor, copies)
        _tell(told, _BEGUN)
        served.run()
        os._exit(0)
    except Exception as error:  # noqa: BLE001  # whatever it is: nobody else could tell
        _tell(told, _explain(error).encode(errors="replace"))
    finally:
        os._exit(1)


def _tell(told: int, what: bytes) -> None:
    """Tell who began us, once, whether we serve; it may have gone, and what takes over tells nobody."""
    if told >= 0:
        with suppress(OSError):
            os.write(told, what[:_LONGEST_REASON])
        close(told)


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _has_finished(keeper: int, copier: int) -> bool:
    """Sleep until the keeper is gone; say whether nothing was left for it to do.

    Meanwhile a dead copier is reaped, and either goes on that was stopped.
    """
    _have_go_on(keeper, copier)
    poll = select.poll()
    pids = {os.pidfd_open(pid): pid for pid in (keeper, copier) if pid > 0}
    for pidfd in pids:
        poll.register(pidfd, select.POLLIN)
    status = None
    while status is None:
        for pidfd, _ in poll.poll():
            _, ended = os.waitpid(pids[pidfd], 0)
            status = ended if pids.pop(pidfd) == keeper else status
            poll.unregister(pidfd)
            close(pidfd)
    for pidfd in pids:
        close(pidfd)
    return status == 0


def _have_go_on(*pids: int) -> None:
    """From now on continue these children whenever a signal has stopped one: a container of root's, or a person, can.

    Their parent is told of that at once, also where no engine is that waits for them.
    """

    def look(*_: object) -> None:
        for pid in pids:
            with suppress(OSError):  # it has ended
                while os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG) is not None:
                    time.sleep(_PAUSE_SECONDS)
                    os.kill(pid, signal.SIGCONT)

    signal.signal(signal.SIGCHLD, look)
    signal.siginterrupt(signal.SIGCHLD, False)  # no call is cut short by it
    look()


def _take_lock() -> int:
    """Lock the directory, for as long as anchor or keeper lives; -1 if another keeper has it."""
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return -1
    return lock


def _take_what_it_may_have() -> None:
    """Be no narrower than we must: who begins us may be nice, bound to a CPU or limited, and we serve others, too."""
    for number in _RAISED:
        _, hard = resource.getrlimit(number)
        resource.setrlimit(number, (hard, hard))
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    with suppress(OSError):
        os.sched_setaffinity(0, range(_MOST_CPUS))  # of which the kernel takes those that we may have


def _take_oom_score() -> None:
    for score in _OOM_SCORES:
        with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(score)
            file.flush()
            return


def _require_proc() -> None:
    """Exit where /proc is that of another pid namespace, whose numbers are other processes', or only a part of it."""
    if os.readlink("/proc/self") != str(os.getpid()):
        sys.exit("/proc is of another pid namespace than this process; mount its own there (unshare --mount-proc)")
    if not os.path.exists("/proc/sys/kernel/random/boot_id"):
        sys.exit("/proc has no /proc/sys; mount all of it (without subset=pid)")


def _require_executed_flag() -> None:
    """Try both cases of what `has_executed` relies on, for no interface promises it. Exits where it does not hold."""
    told_by_flag = []
    for executes in (False, True):
        pid = os.fork()
        if not pid:
            try:
                if executes:
                    os.execv(sys.executable, [sys.executable, "-V"])  # noqa: S606
            finally:
                os._exit(0)
        while (told := os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)) is not None:
            if told.si_code != os.CLD_STOPPED:
                break
            os.kill(pid, signal.SIGCONT)
        stat = read_stat(pid)
        told_by_flag.append(stat is not None and stat.has_executed)
        os.waitpid(pid, 0)
    if told_by_flag != [False, True]:
        sys.exit("this kernel does not tell whether a process has executed a program (field 9 of /proc/PID/stat)")
