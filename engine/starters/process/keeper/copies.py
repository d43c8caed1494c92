"""The containers' output on its way to the log copier: named pipes that outlive each reader.

A container's own descriptors hold its pipes open for reading and writing, so that it gets no SIGPIPE when a reader
dies; the keeper holds a reading end, so that nothing in them is lost while a new copier comes.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from . import copier
from .journal import Record
from .kernel import close, close_from, go_on_at, name_process
from .messages import receive, send

_STREAMS = ("out", "err")
_NOTE = "at"
_FOLDER = "fifo"
_PAUSE_SECONDS = 0.1
"""A copier that lives no longer than this is begun anew at the next tick only."""
_MODE = 0o622
"""Who drops its privileges may still open /dev/stderr; strangers stop at the directory above."""


class Copies:
    """The pipes of all containers, and the process that copies them to logs."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._kept: dict[str, tuple[Record, list[int]]] = {}  # by container: its log, and its pipes' reading ends
        self._serials: dict[str, str] = {}  # which of the pipes that a container has had
        self._last_serial = 0
        self._untidied: set[str] = set()  # pipes that could not be removed yet
        self._unsent: dict[str, Sequence[int]] = {}  # the log directory with it, if somebody has opened it
        self._troubles: dict[str, str] = {}  # why a log cannot be written
        self._released: set[str] = set()  # their output need not wait for a log that cannot be written
        self._can_peek = False  # until that is known
        self._started_at = 0.0
        self._watch: Callable[[int, Callable[[], None]], None]
        self._unwatch: Callable[[int], None]
        self._link: socket.socket | None = None
        self.pid = 0
        """The copier's; 0 while there is none."""
        self._make_folder()
        self.start_copier()

    def start_copier(self) -> socket.socket:
        """Fork a copier; return our end of the link to it. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
            if not pid:
                _become_copier(theirs, self._directory)
            go_on_at(theirs.fileno(), pid)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._link, self.pid, self._started_at = ours, pid, time.monotonic()
        return ours

    def watch(self, watch: Callable[[int, Callable[[], None]], None], unwatch: Callable[[int], None]) -> None:
        """Have the keeper's loop listen to the copier."""
        self._watch, self._unwatch = watch, unwatch
        if self._link is not None:
            watch(self._link.fileno(), self._listen)

    def make(self, key: str, log: Record, owner: int) -> tuple[int, int]:
        """Make the pipes of a container; return a descriptor of each for its process. Raises OSError.

        What is in pipes that it had before is copied on, as long as this copier lives.
        """
        if not self._can_peek:
            copier.require_peek()
            self._can_peek = True
        pipes = _name_pipes(key, log)
        self._remove(key, pipes, _STREAMS)
        opened = []
        try:
            self._make_folder()  # who clears away what is old has perhaps removed it, empty as it was
            for stream in _STREAMS:
                path = f"{pipes}.{stream}"
                self._untidied.discard(path)
                os.mkfifo(path, 0o600, dir_fd=self._directory)
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
                opened.append(descriptor)
                os.fchmod(descriptor, _MODE)
                if owner >= 0 and os.geteuid() == 0:
                    os.fchown(descriptor, owner, -1)
            readers = self._open_readers(pipes)
        except BaseException:
            for descriptor in opened:
                close(descriptor)
            self._remove(key, pipes)
            raise
        self._keep(key, {name: log[name] for name in log if name == "pipes"}, readers)  # the rest once it begins
        return opened[0], opened[1]

    def discard(self, key: str) -> None:
        """Give up pipes that no process has got. Copying them, if that has begun, ends by itself."""
        if key in self._kept:
            self._finish(key)

    def begin(self, key: str, log: Record, log_directory: Sequence[int]) -> None:
        """Have a container's output copied to its log, in the directory behind the descriptor. Raises OSError."""
        directory: list[int] = []
        try:
            directory += [os.dup(each) for each in log_directory]
        except BaseException:
            for descriptor in directory:
                close(descriptor)
            raise
        self._kept[key] = (log, self._kept[key][1])
        self._unsent[key] = directory
        with suppress(OSError):  # a copier that has just died: the next one is given it
            self._send_all()

    def begin_again(self, key: str, log: Record) -> None:
        """Go on with a container whose keeper died; a pipe is gone if all of its output was copied.

        Raises OSError if they cannot be opened now.
        """
        if key in self._kept:
            return
        pipes = _name_pipes(key, log)
        try:
            readers = self._open_readers(pipes)
        except FileNotFoundError:
            self._remove(key, pipes)  # what is left of them
            return
        self._keep(key, log, readers)
        self._unsent[key] = ()

    def sweep(self, known: Mapping[str, Record]) -> None:
        """Remove the pipes of containers that are not known any more: their keeper died amid removing them.

        A copier that still has them copies what is in them.
        """
        wanted = {_name_pipes(key, record.get("log") or {}) for key, record in known.items()}
        with suppress(OSError):  # the next keeper does it as well
            found = (f"{_FOLDER}/{name}" for name in os.listdir(f"/proc/self/fd/{self._directory}/{_FOLDER}"))
            self._untidied.update(path for path in found if path.rpartition(".")[0] not in wanted)
        self._tidy()

    def reopen(self, key: str) -> None:
        """Have a log opened anew: its file was moved. Raises OSError."""
        if self._link is not None:
            send(self._link, {"op": "reopen", "id": key})

    def give_up(self, key: str) -> None:
        """Give up the output of a container that is released, now or later, if its log cannot be written."""
        if key not in self._kept:
            return
        self._released.add(key)
        if self._link is not None and self._troubles.get(key):
            with suppress(OSError):  # it takes no message now: tried again
                send(self._link, {"op": "drop", "id": key})
                self._finish(key)

    def is_copying(self, key: str) -> bool:
        """Say whether output of a container is on its way to its log, which can be written."""
        return key in self._kept and not self._troubles.get(key)

    @property
    def are_open(self) -> bool:
        """True while there is output that may have to be copied."""
        return bool(self._kept)

    @property
    def need_care(self) -> bool:
        """True if something could not be done and is to be tried again."""
        return self._link is None or bool(self._unsent or self._untidied or self._released & self._troubles.keys())

    def care(self) -> None:
        """Try again what could not be done. Raises OSError."""
        if self._link is None:
            link = self.start_copier()
            try:
                self._watch(link.fileno(), self._listen)
            except BaseException:
                self._leave_copier()  # nobody would hear it, and it has nothing to copy: another one is begun
                raise
            self._unsent = dict.fromkeys(self._kept, ()) | self._unsent
        self._tidy()
        self._send_all()
        for key in [key for key in self._released if key in self._troubles]:
            self.give_up(key)

    def _make_folder(self) -> None:
        with suppress(FileExistsError):
            os.mkdir(_FOLDER, 0o700, dir_fd=self._directory)

    def _keep(self, key: str, log: Record, readers: list[int]) -> None:
        self._last_serial += 1
        self._released.discard(key)
        self._kept[key], self._serials[key] = (log, readers), f"{os.getpid()}.{self._last_serial}"

    def _listen(self) -> None:
        """Take note that the copier has finished with a container; or that it has died, and give another all pipes."""
        assert self._link is not None
        message, _ = receive(self._link)
        if message is not None:
            if message["op"] == "done":
                # Otherwise it has others by now. What a keeper before us began is known by no serial.
                if self._serials.get(message["id"], message["serial"]) == message["serial"]:
                    self._finish(message["id"])
            elif message["op"] == "trouble" and message["id"] in self._kept:
                self._troubles[message["id"]] = message["why"]
                if message["id"] in self._released:
                    self.give_up(message["id"])
            return
        self._leave_copier()
        if time.monotonic() - self._started_at > _PAUSE_SECONDS:
            self.care()

    def _leave_copier(self) -> None:
        """Close the link, by which it ends. Whose child it is reaps it, as any other: it has not ended yet."""
        if self._link is not None:
            self._unwatch(self._link.fileno())
            self._link.close()
            self._link = None
            self.pid = 0

    def _send_all(self) -> None:
        for key in list(self._unsent):
            log, readers = self._kept[key]
            if self._link is None or "name" not in log:
                continue
            try:
                directory = self._unsent[key] = self._unsent[key] or [self._open_directory(log)]
                note = self._open_note(_name_pipes(key, log))
            except OSError as error:
                self._troubles[key] = str(error)
                continue  # tried again; the others need not wait for it
            message = {"op": "copy", "id": key, "serial": self._serials[key]}
            message |= {name: log[name] for name in ("name", "max_bytes", "max_files")}
            try:
                send(self._link, message, [*directory, note, *readers])
            except BlockingIOError:
                return
            finally:
                close(note)
            del self._unsent[key]
            self._troubles.pop(key, None)
            for descriptor in directory:
                close(descriptor)

    def _open_directory(self, log: Record) -> int:
        """Open the directory of a log, following no link on the way. Raises OSError.

        One within the state directory is where that is now: it may have been moved since the container was started.
        """
        within = log.get("within")
        path, start = (log["directory"], "/") if within is None else (within, "..")
        flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        directory = os.open(start, flags, dir_fd=self._directory)
        for name in filter(None, path.split("/")):
            try:
                below = os.open(name, flags, dir_fd=directory)
            finally:
                close(directory)
            directory = below
        return directory

    def _finish(self, key: str) -> None:
        self._troubles.pop(key, None)
        log, _ = self._kept.get(key, ({}, []))
        self._remove(key, _name_pipes(key, log))

    def _open_readers(self, pipes: str) -> list[int]:
        opened: list[int] = []
        try:
            for stream in _STREAMS:
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
                opened.append(os.open(f"{pipes}.{stream}", flags, dir_fd=self._directory))
        except BaseException:
            for descriptor in opened:
                close(descriptor)
            raise
        return opened

    def _open_note(self, pipes: str) -> int:
        """Open the note that the copier writes. We make it, as we remove it: no copier that is late leaves one."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(f"{pipes}.{_NOTE}", flags, 0o600, dir_fd=self._directory)

    def _remove(self, key: str, pipes: str, endings: Sequence[str] = (*_STREAMS, _NOTE)) -> None:
        _, readers = self._kept.pop(key, ({}, []))
        self._serials.pop(key, None)
        self._released.discard(key)
        for descriptor in (*readers, *self._unsent.pop(key, ())):
            close(descriptor)
        self._untidied.update(f"{pipes}.{ending}" for ending in endings)
        self._tidy()

    def _tidy(self) -> None:
        """Remove what belongs to no container any more; what cannot be removed now is tried again."""
        for path in list(self._untidied):
            with suppress(OSError):
                with suppress(FileNotFoundError):
                    os.unlink(path, dir_fd=self._directory)
                self._untidied.remove(path)


def _name_pipes(key: str, log: Record) -> str:
    """Return how the paths of a container's pipes begin; an older engine has a file name for an id."""
    return f"{_FOLDER}/{log.get('pipes', key)}"


def _become_copier(link: socket.socket, directory: int) -> None:
    try:
        name_process("limpet-copier")
        kept = {link.fileno(), directory}
        for number in range(3, max(kept)):
            if number not in kept:
                close(number)
        close_from(max(kept) + 1)
        copier.run(link, directory)
    finally:
        os._exit(1)
