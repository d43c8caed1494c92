"""Speaks to the keeper of a state directory, and has one begin where there is none.

Each request has a connection of its own while it lasts; the connections are kept for the next. If a call is given up,
its connection is closed, by which the keeper knows: what it held for that call ends.
"""

import errno
import fcntl
import os
import select
import signal
import socket
import stat
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from limpet.engine.starters.orphans import reap_with_session
from limpet.engine.starters.process import keeper
from limpet.engine.starters.process.interpreter import require_interpreter
from limpet.engine.starters.process.keeper.listener import SOCKET
from limpet.engine.starters.process.keeper.main import ANOTHER_LIVES, KILLED, LOCK
from limpet.engine.starters.process.keeper.messages import LONGEST, VERSION, Message, encode, read_peer, receive, send
from limpet.engine.starters.signals import let_go_on
from limpet.engine.state.descriptors import close_all
from limpet.engine.state.durable import make_directory
from limpet.engine.state.holders import find_stopped
from limpet.recovery.host import read_pid_namespace, wait_for_end
from limpet.schema.errors import KeeperError, quote, quote_path
from limpet.schema.identity import ProcessIdentity
from limpet.schema.telling import get_log

_log = get_log("limpet.starter")
_T = TypeVar("_T")

ANSWER_TIMEOUT_SECONDS = 10.0
_PATIENCE_SECONDS = 1.0
"""As often it is seen, while an answer does not come, whether one of the keeper's processes is stopped."""
_BEGIN_TIMEOUT_SECONDS = 20.0
_RETRY_SECONDS = 0.002
_TRIES = 3
"""With keepers that die one after the other."""
_DYING_SECONDS = 1.0
"""How long a keeper that was killed may hold its lock."""
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from keeper.main import main; main()"
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_UNBLOCKABLE = {signal.SIGKILL, signal.SIGSTOP}
_LONGEST_COMPLAINT = 4096
_FIRST_FREE = 10
_KNOWS_MANY = 2
"""The first version of a keeper that can be asked about many containers at once."""
_TELLS_OFFSET = 3
"""The first version of a keeper whose gates tell by the offset of their plans that they execute the program."""
_MANY = 128
_LONGEST_MANY = LONGEST // 2
_LONGEST_LIST = 1 << 18
"""Of a keeper of version 1, which does not see to it that its list fits into a message."""


class KeeperGoneError(KeeperError):
    """The keeper ended before it answered; the one that takes over knows what it knew."""


class ForeignKeeperError(KeeperError):
    """The keeper lives in another pid namespace: its pids name other processes here, or none."""


class NoKeeperError(KeeperError):
    """What listens at the keeper's socket is none: nobody holds the keeper's lock."""


class Connection:
    """One connection to a keeper; one request at a time."""

    def __init__(self, link: socket.socket, directory: str) -> None:
        self._link = link
        self._directory = directory
        self.version = 0
        """Of the keeper; 0 until it has answered the first time."""
        self.view: list[int] = []
        """What the keeper sees of files: see `read_view`. Empty if it does not tell, and takes no other."""
        self._timeout = 0.0
        self._unread = 0
        """Answers that are still to come, and are not waited for."""

    @property
    def tells_offset(self) -> bool:
        """Say whether a gate of this keeper's tells by the offset of its plan that it executes the program."""
        return self.version >= _TELLS_OFFSET

    def reach(self) -> None:
        """Connect. Raises OSError if nobody listens, NoKeeperError if it is no keeper that does."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_SECONDS
        look_at = time.monotonic() + _PATIENCE_SECONDS
        dead_at = time.monotonic() + _DYING_SECONDS
        directory = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._link.setblocking(False)
            while True:
                try:
                    self._link.connect(f"/proc/self/fd/{directory}/{SOCKET}")
                    return
                except BlockingIOError:  # as many as have room wait already until they are accepted
                    if (now := time.monotonic()) > deadline:
                        raise
                    if now > look_at:
                        self._look_at_silent()
                        look_at = now + _PATIENCE_SECONDS
                    time.sleep(_RETRY_SECONDS)
                except OSError as error:
                    if error.errno != errno.EPROTOTYPE:
                        raise
                    self.require_keeper()  # a socket of another type is none's
                    if time.monotonic() > dead_at:
                        raise
                    time.sleep(_RETRY_SECONDS)
        finally:
            os.close(directory)

    def require_keeper(self) -> None:
        """Raise NoKeeperError if who listens cannot be a keeper: its processes hold the lock as long as one lives."""
        if not _is_locked(self._directory):
            path = quote_path(os.path.join(self._directory, SOCKET))
            raise NoKeeperError(
                f"{path}: what listens there{self._name_peer()} is no keeper, for nobody holds the keeper's lock; end"
                " it, or move that file away, and try again: containers that run are not affected"
            )

    def _name_peer(self) -> str:
        with suppress(OSError):
            pid, _ = read_peer(self._link)
            with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                return f", process {pid} ({quote(file.read().strip())}),"
        return ""

    def _look_at_silent(self) -> None:
        """Have what does not answer go on, if it was stopped. Raises NoKeeperError if it cannot be a keeper."""
        if not self.version:
            self.require_keeper()
        _let_go_on(self._directory)

    def ask(self, message: Message, descriptors: Sequence[int] = ()) -> tuple[Message, list[int]]:
        """Return the answer and its descriptors, which are the caller's.

        Raises KeeperGoneError, KeeperError if it answers with an error or not in time.
        """
        self.tell(message, descriptors)
        return self.wait_for_answer(message)

    def wait_for_answer(self, message: Message) -> tuple[Message, list[int]]:
        """Return the answer to what was told it before, as `ask` does."""
        try:
            for _ in range(self._unread):
                self._receive(LONGEST)
            self._unread = 0
            answer, given = self._receive(_LONGEST_LIST if message["op"] == "list" else LONGEST)
        except BlockingIOError as error:
            raise KeeperError(
                f"the keeper has not answered {message['op']!r} for {ANSWER_TIMEOUT_SECONDS:g} s"
            ) from error
        except OSError as error:
            raise KeeperGoneError(f"the keeper is gone: {error.strerror or error}") from error
        except ValueError as error:
            raise KeeperError(f"the keeper answers {message['op']!r}, and {error}") from error
        if answer is None:
            raise KeeperGoneError("the keeper is gone")
        if "error" in answer:
            close_all(given)
            raise KeeperError(answer["error"])
        return answer, given

    def _receive(self, most: int) -> tuple[Message | None, list[int]]:
        if not self._wait_for_any(self._link.fileno()):
            raise BlockingIOError
        return receive(self._link, most)

    def _wait_for_any(self, *descriptors: int) -> dict[int, int]:
        """Return what happens to any of them, nothing if it takes too long; what was stopped meanwhile goes on.

        Raises KeeperGoneError if one is closed already, as when the engine is closed meanwhile.
        """
        poll = select.poll()
        for each in descriptors:
            if each < 0:
                raise KeeperGoneError("the connection to the keeper was closed")
            poll.register(each, select.POLLIN)
        deadline = time.monotonic() + ANSWER_TIMEOUT_SECONDS
        while not (ready := poll.poll(_PATIENCE_SECONDS * 1000)) and time.monotonic() < deadline:
            self._look_at_silent()
        return dict(ready)

    def wait_for_either(self, descriptor: int) -> bool:
        """Wait until a descriptor is at its end, with nothing left to read, or there is an answer.

        Say whether it is the former. Raises KeeperError if neither comes in time.
        """
        ready = self._wait_for_any(descriptor, self._link.fileno())
        if not ready:
            raise KeeperError(f"nothing has happened for {ANSWER_TIMEOUT_SECONDS:g} s")
        return bool(ready.get(descriptor, 0) & select.POLLHUP) and not ready[descriptor] & select.POLLIN

    def forgo_answer(self) -> None:
        """Have the answer to what was told it before dropped when it comes: what it says is known already."""
        self._unread += 1

    def tell(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message, whose answer is not waited for here. Raises KeeperGoneError, KeeperError."""
        try:
            if self._timeout != ANSWER_TIMEOUT_SECONDS:
                self._set_timeout(ANSWER_TIMEOUT_SECONDS)
            send(self._link, message, descriptors)
        except BlockingIOError as error:
            raise KeeperError(f"the keeper takes no {message['op']!r}: it has not read for some time") from error
        except OSError as error:
            raise KeeperGoneError(f"the keeper is gone: {error.strerror or error}") from error

    def _set_timeout(self, seconds: float) -> None:
        """Have the kernel limit how long a call waits. Where Python does, it asks twice before each call."""
        whole, rest = divmod(round(seconds * 1e6), 10**6)
        limit = struct.pack("@ll", whole, rest)  # struct timeval
        self._link.settimeout(None)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self._link.setsockopt(socket.SOL_SOCKET, option, limit)
        self._timeout = seconds

    def close(self) -> None:
        """Close it; what the keeper holds for it ends. May be repeated."""
        with suppress(OSError):  # it is closed already, by who closes what is not his
            self._link.close()


class KeeperClient:
    """Connections to the keeper in one directory. Thread-safe."""

    def __init__(self, directory: str, interpreter: str = "") -> None:
        """`interpreter` is the Python that runs the keeper; this process's own by default."""
        self._directory = directory
        self._interpreter = interpreter
        self._idle: list[Connection] = []
        self._all: weakref.WeakSet[Connection] = weakref.WeakSet()
        """Also one that an interrupted call has left behind."""
        self._beginning = threading.Lock()
        self._is_closed = False
        self.keeper_pid = 0
        """The pid of the keeper that was spoken to last."""
        self._stranger = (0, 0), ""
        """Which socket was found to be no keeper's, and what is to be said of it."""

    def take(self, *, begin: bool) -> Connection | None:
        """Return a connection, to be given back or closed; None if there is no keeper and none is to `begin`.

        One of another pid namespace counts as none, and so does what listens and is no keeper; where one is to `begin`,
        either is in the way. Raises KeeperError, also once this is closed: a call that nobody waits for any more may go
        on behind that, and is to leave nothing with a keeper.
        """
        with suppress(IndexError):
            return self._idle.pop()
        self._require_open()
        try:
            connection = self._connect()
        except (ForeignKeeperError, NoKeeperError):
            if begin:
                raise
            return None
        if connection is None and begin:
            connection = self._begin()
        if connection is not None and self._is_closed:  # meanwhile
            connection.close()
            self._require_open()
        return connection

    def _require_open(self) -> None:
        if self._is_closed:
            raise KeeperError(f"the keeper in {self._directory} is not asked any more: this engine is closed")

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        if self._is_closed:
            connection.close()
        else:
            self._idle.append(connection)

    @contextmanager
    def connection(self, *, begin: bool) -> Iterator[Connection | None]:
        """Hold a connection while the block runs; one whose request failed is closed."""
        connection = self.take(begin=begin)
        try:
            yield connection
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        if connection is not None:
            self.give_back(connection)

    def ask(self, message: Message, *, begin: bool = False) -> Message | None:
        """Return the keeper's answer to a request that may be repeated; None if there is none, and none is to `begin`.

        One of another pid namespace counts as none, here in either case. A keeper that died is asked again: the anchor
        has taken over. Raises KeeperError, with `begin` UnsupportedError.
        """
        for _ in range(_TRIES):
            try:
                with self.connection(begin=begin) as connection:
                    return None if connection is None else connection.ask(message)[0]
            except KeeperGoneError:
                self.forget_connections()
            except ForeignKeeperError:
                return None
        raise KeeperError(f"the keeper in {self._directory} ends whenever it is asked for {message['op']!r}")

    def ask_for_many(self, message: Message, many: Sequence[Message]) -> "list[Message]":
        """Return the answers to a request about many containers, as far as they can be had: in order, and perhaps none.

        The rest is to be asked one by one, which tells what is in the way.
        """
        answers: list[Message] = []
        with suppress(KeeperError), self.connection(begin=False) as connection:
            while connection is not None and connection.version >= _KNOWS_MANY and len(answers) < len(many):
                rest = next(portions(many[len(answers) :]))
                told = connection.ask(message | {"many": rest})[0]["answers"]
                if not told:
                    break
                answers += told
        return answers

    def tell(self, message: Message) -> None:
        """Send what has no answer; nothing happens if there is no keeper. Raises KeeperError."""
        for _ in range(_TRIES):
            try:
                with self.connection(begin=False) as connection:
                    if connection is not None:
                        connection.tell(message)
                    return
            except KeeperGoneError:
                self.forget_connections()
        raise KeeperError(f"the keeper in {self._directory} ends whenever it is told {message['op']!r}")

    def forget_connections(self) -> None:
        """Close the connections that nobody uses; what is needed is connected anew."""
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

    def close(self) -> None:
        """Close all connections. The keeper stays as long as it is needed. May be repeated."""
        self._is_closed = True
        self.forget_connections()
        for connection in list(self._all):
            connection.close()

    @property
    def has_left_ends(self) -> bool:
        """Say whether a keeper that is gone may have left ends in its journal."""
        try:
            return os.stat(os.path.join(self._directory, "journal")).st_size > 0
        except FileNotFoundError:
            return False

    def _connect(self) -> Connection | None:
        """Connect to the keeper that lives; None if there is none. Raises KeeperError.

        Of one that dies meanwhile the anchor takes over: that is no time without a keeper.
        """
        for _ in range(_TRIES):
            with suppress(KeeperGoneError):
                return self._connect_once()
        return None

    def _connect_once(self) -> Connection | None:
        """Do so, unless that one dies meanwhile. Raises KeeperGoneError, KeeperError."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connection = Connection(link, self._directory)
            self._all.add(connection)
            connection.reach()
            found, why = self._stranger
            if why and found == self._find_socket() and not _is_locked(self._directory):
                raise NoKeeperError(why)  # its answer is not waited for each time
            _, uid = read_peer(link)
            if uid != os.geteuid():
                raise KeeperError(f"the keeper in {quote_path(self._directory)} is of uid {uid}; run as that user")
            return self._greet(connection)
        except (FileNotFoundError, ConnectionRefusedError):
            link.close()
            return None
        except OSError as error:
            link.close()
            raise KeeperError(f"the keeper cannot be reached: {error.strerror or error}") from error
        except BaseException as error:
            link.close()
            if isinstance(error, NoKeeperError):
                with suppress(OSError):  # its file is gone meanwhile
                    self._stranger = self._find_socket(), str(error)
            raise

    def _find_socket(self) -> tuple[int, int]:
        """Return which file the socket is. Raises FileNotFoundError, OSError."""
        found = os.lstat(os.path.join(self._directory, SOCKET))
        return found.st_dev, found.st_ino

    def _greet(self, connection: Connection) -> Connection:
        try:
            answer, _ = connection.ask({"op": "hello", "version": VERSION})
            namespace, version, pid = (answer[name] for name in ("pid_namespace", "version", "pid"))
        except (KeeperGoneError, NoKeeperError):
            raise
        except (KeeperError, KeyError) as error:
            connection.require_keeper()
            if isinstance(error, KeeperError):
                raise
            raise KeeperError(f"the keeper in {quote_path(self._directory)} answers 'hello' without {error}") from error
        here = read_pid_namespace()
        if namespace != here:
            raise ForeignKeeperError(
                f"the keeper in {quote_path(self._directory)} lives in pid namespace {namespace}, this is"
                f" {here}; its containers can be looked after from there only"
            )
        connection.version = version
        connection.view = answer.get("view", [])
        self.keeper_pid = pid
        return connection

    def _begin(self) -> Connection:
        """Have a keeper begin, and connect to it. Raises KeeperError, UnsupportedError."""
        with self._beginning:
            deadline = time.monotonic() + _BEGIN_TIMEOUT_SECONDS
            complaint, killed, other_lives = "", 0, False
            while time.monotonic() < deadline and killed < _TRIES:
                connection = self._connect()
                if connection is not None:
                    return connection
                status, complaint = self._spawn(deadline)
                if status == KILLED and time.monotonic() < deadline:  # else by us, for it has taken too long
                    killed += 1
                elif status not in {0, ANOTHER_LIVES, KILLED, None}:
                    break
                other_lives = status == ANOTHER_LIVES or (other_lives and status == KILLED)
                if status == ANOTHER_LIVES:
                    _let_go_on(self._directory)  # who began it may be gone
                    time.sleep(_RETRY_SECONDS)  # it is about to serve, or about to end
            silence = self._tell_silent() if other_lives else "it does not answer"
            silence = "it was killed as it began" if killed else silence
            raise KeeperError(f"the keeper cannot begin: {complaint or silence}")

    def _tell_silent(self) -> str:
        """Say why a keeper that lives is not reached."""
        path = os.path.join(self._directory, SOCKET)
        with suppress(OSError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):  # a directory: what else is there the keeper replaces
                return f"another one lives, and {quote_path(path)} is no socket; move it away and try again"
        return "another one lives, and does not listen"

    def _spawn(self, deadline: float) -> tuple[int | None, str]:
        """Run the keeper's program until it serves, or cannot; return its exit status, None if not known, and why."""
        opened: list[int] = []
        try:
            make_directory(self._directory)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            opened.append(directory := _high(os.open(self._directory, flags)))
            opened.append(null := _high(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)))
            read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            opened += (read, write := _high(write))
            actions = [
                (os.POSIX_SPAWN_DUP2, each, number) for number, each in enumerate((null, null, write, directory))
            ]
            interpreter = require_interpreter(self._interpreter)
            # posix_spawn: a fork of this process by another thread holds no pipe that we would wait for.
            pid = os.posix_spawn(
                interpreter,
                [interpreter, "-I", "-S", "-X", "utf8", "-c", _PROGRAM, os.path.dirname(keeper.__path__[0])],
                _ENVIRONMENT,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=[number for number in signal.valid_signals() if number not in _UNBLOCKABLE],
            )
            status = _wait(pid, deadline)
            complaint = b""
            with suppress(BlockingIOError):
                complaint = os.read(read, _LONGEST_COMPLAINT)
        except OSError as error:
            name = f" ({error.filename})" if error.filename else ""
            raise KeeperError(f"the keeper cannot begin: {error.strerror}{name}") from error
        finally:
            close_all(opened)
        return status, complaint.decode(errors="replace").strip().rpartition("\n")[2]


def is_about(answer: Message, identity: ProcessIdentity) -> bool:
    """Say whether the keeper's answer is about the very process."""
    if (answer.get("pid"), answer.get("start")) != (identity.pid, identity.start_ticks):
        return False
    inode = answer.get("inode", 0)
    return not inode or not identity.pidfd_inode or inode == identity.pidfd_inode


def is_vouched_for(answer: Message | None) -> bool:
    """Return whether the keeper is the process's parent and has not reaped it, so that its pid is its own.

    Another keeper, which found it there, has nothing but its pid and start time.
    """
    return answer is not None and not answer.get("stranger")


def is_copying(keeper: KeeperClient, container_id: str) -> bool:
    """Say whether output of one that has ended is on its way to its log, and nothing is left that writes more."""
    with suppress(KeeperError):  # then nobody copies
        answer = keeper.ask({"op": "end", "id": container_id}) or {}
        return bool(answer.get("copying") and answer.get("empty", True))
    return False


def portions(many: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Yield these in order, as many at once as a message has room for."""
    first = 0
    while first < len(many):
        left, end = _LONGEST_MANY, first
        while end < len(many) and end - first < _MANY and (left > 0 or end == first):
            left -= len(encode(many[end]))
            end += 1
        yield many[first:end]
        first = end


def _let_go_on(directory: str) -> None:
    """Continue what was stopped of a directory's keeper, by a container of root's or by a person: nobody else would.

    Its processes are those that hold its lock, whatever they are about to become: while one begins, or takes over from
    one that is dead, our peer is who has begun to listen, and that process has ended.
    """
    with suppress(OSError):
        lock = os.open(os.path.join(directory, LOCK), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for pid, pidfd in find_stopped(lock, with_lock=False):  # it may be about to lock it
                with suppress(OSError):  # it has ended
                    if let_go_on(pid, pidfd):
                        _log.warning("process %d, of the keeper's, was stopped by a signal; it was sent SIGCONT", pid)
        finally:
            os.close(lock)


def _is_locked(directory: str) -> bool:
    """Say whether a keeper lives in a directory, or is about to: it holds the lock. Raises OSError."""
    try:
        lock = os.open(os.path.join(directory, LOCK), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # who begins just now is told that another lives, and retried
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _wait(pid: int, deadline: float) -> int | None:
    """Return a child's exit status, KILLED if a signal has ended it; None if somebody else has reaped it.

    One that takes too long is ended.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return None
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise OSError(error.errno, f"pidfd_open(2): {error.strerror}") from error
    try:
        while not wait_for_end(pidfd, max(0.0, min(_PATIENCE_SECONDS, deadline - time.monotonic()))):
            if time.monotonic() > deadline:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                break
            with suppress(OSError):
                let_go_on(pid, pidfd)
        found = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        reap_with_session(pidfd, pid)  # it has begun a session of its own, in which all of a keeper's processes stay
        if found is None:
            return None
        return int(found.si_status) if found.si_code == os.CLD_EXITED else KILLED
    except ChildProcessError:
        return None
    finally:
        os.close(pidfd)


def _high(descriptor: int) -> int:
    """Move a descriptor above those that the keeper is given, so that none overwrites another."""
    if descriptor >= _FIRST_FREE:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    finally:
        close_all((descriptor,))
