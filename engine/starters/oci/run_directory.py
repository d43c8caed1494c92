"""The directory of one start, `<bundle>/oci/<token>/`: what the runtime and conmon are given, and what they leave.

config.json      what the runtime is to run               pidfile, conmon-pidfile   as conmon writes them
processes.json   which processes these are                exit, oom                 how it ended, as conmon saw it
held             nobody has asked the runtime to let it   attach, ctl, winsz        conmon's doors
                 go; becomes `starting`, or `never-ran`   conmon.log                what conmon itself says
starting         the runtime was asked to let it go       exec-TOKEN.json, .pid     a command, and its pid
executed         the program was seen to be executed      limits-before.json        see `limit_files`
never-ran        it was ended while it was held           exits/ID, oom             what they say; not read

Each start has one of its own, so that a conmon which comes late can write into no other's. That a mark is missing says
nothing: a container may run for longer than a cleaner of old files, or a person, leaves files alone.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from limpet.engine.state.durable import make_one_directory, open_made, write_unflushed
from limpet.engine.state.names import OCI
from limpet.engine.state.presence import is_there
from limpet.recovery.files import find_small_file, read_small_file
from limpet.schema.decoders import make_decoder
from limpet.schema.identity import ProcessIdentity

_PROCESSES = "processes.json"
_MOST_BYTES = 64 << 10
_BELOW_STATE = 4
"""So many names has a start's path below the state directory, and so many has that of the runtime's directory of it."""
_YOUNG_SECONDS = 60.0


class Processes(msgspec.Struct, frozen=True, kw_only=True):
    """The processes of one start, written before the program may run."""

    init: ProcessIdentity
    """The container's first process, held by the runtime: it has not executed the program yet."""
    monitor: ProcessIdentity
    """Its conmon."""
    held_program: tuple[int, int]
    """Device and inode of what `init` has executed while it is held: the runtime itself."""
    entry: str
    """The runtime's directory of the container."""
    oci_id: str
    cgroups: tuple[str, ...]
    """Its cgroups, as /proc/PID/cgroup names them."""
    cgroup: str
    """The cgroup that the runtime was given, as config.json has it."""
    flaw: str | None = None
    """Why the kernel could not execute its program when it was made, "" if it could; None if that is not known."""
    has_own_pids: bool = True
    """True if the kernel ends all of it with `init`: it has a pid namespace to itself."""
    is_plain: bool = False
    """True if the runtime has nothing to do after its end but to forget it: no hooks, no resource groups (intelRdt)."""


_processes = make_decoder(Processes)


class RunDirectory:
    """One of them."""

    def __init__(self, path: str) -> None:
        self.path = path

    def join(self, name: str) -> str:
        """Return the path of an entry."""
        return os.path.join(self.path, name)

    def has(self, name: str) -> bool:
        """Return whether an entry is there. Raises OSError."""
        return is_there(self.join(name))

    def mark(self, name: str) -> None:
        """Make an empty entry: it survives a kill, and after a power cut nothing asks for it."""
        os.close(open_made(self.join(name), os.O_WRONLY))

    def was_let_go(self) -> bool:
        """Return whether the runtime was asked to let the program run, so that it may have. False says nothing."""
        return self.has("starting") or self.has("executed")

    def was_never_let_go(self) -> bool:
        """Return whether the program of a start cannot have run, in this boot. False says nothing. Raises OSError."""
        return self.has("never-ran") or (self.has("held") and not self.was_let_go())

    def mark_starting(self) -> None:
        """Say that the runtime is asked to let the program run: "held" becomes that. Raises OSError."""
        self._turn("held", "starting")

    def mark_never_ran(self) -> None:
        """Say that a start was given up before its program was executed. Raises OSError.

        What it was before becomes that: a full disk takes it, and a power cut leaves the one or the other.
        """
        self._turn("starting" if self.has("starting") else "held", "never-ran")

    def _turn(self, before: str, after: str) -> None:
        try:
            os.rename(self.join(before), self.join(after))
        except FileNotFoundError:
            self.mark(after)

    def write_processes(self, processes: Processes) -> None:
        """Write down which processes these are: it survives a kill, and after a power cut none of them is there.

        Raises OSError.
        """
        write_unflushed(self.join(_PROCESSES), msgspec.json.encode(processes))

    def read_processes(self) -> Processes | None:
        """Return which processes these are; None if that was not written, or is damaged. Raises OSError.

        The runtime's directory has the path of now: the state directory may have been moved since it was written.
        """
        with suppress(msgspec.MsgspecError, UnicodeDecodeError):
            found = _processes.decode(find_small_file(self.join(_PROCESSES), _MOST_BYTES) or b"")
            return replace(found, entry=self._bring_home(found.entry))
        return None

    def _bring_home(self, entry: str) -> str:
        below = entry.split("/")[-_BELOW_STATE:]
        state_dir = self.path.rsplit("/", _BELOW_STATE)[0]
        return os.path.join(state_dir, *below) if below[0] == OCI else entry

    def is_being_started(self) -> bool:
        """Return whether a start by the runtime is still under way, perhaps one of an engine that is dead."""
        try:
            descriptor = os.open(self.join("starting"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def read_pid(self, name: str) -> int:
        """Return the pid in a pid file, 0 if there is none."""
        with suppress(OSError, ValueError):
            return int(read_small_file(self.join(name), 32))
        return 0

    def await_pid(self, name: str, seconds: float) -> None:
        """Wait for a pid file, if this directory was made just now; for so long at most."""
        deadline = time.monotonic() + seconds
        with suppress(FileNotFoundError):
            while not self.has(name) and time.time() - os.stat(self.path).st_mtime < _YOUNG_SECONDS:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)


def make_run_directory(bundle_path: str) -> RunDirectory:
    """Make one for a start. Raises OSError."""
    above = os.path.join(bundle_path, OCI)
    with suppress(FileExistsError):
        make_one_directory(above)
    if os.path.islink(above):
        raise NotADirectoryError(errno.ENOTDIR, "it is a symbolic link", above)
    run = RunDirectory(os.path.join(above, os.urandom(6).hex()))
    make_one_directory(run.path)
    make_one_directory(run.join("exits"))
    run.mark("held")
    return run


def list_runs(bundle_path: str) -> Iterator[RunDirectory]:
    """Yield those of a bundle: one, unless a start was cut short."""
    above = os.path.join(bundle_path, OCI)
    names = list[str]()
    if not os.path.islink(above):  # what a link leads to is somebody else's
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(above) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    for name in names:
        yield RunDirectory(os.path.join(above, name))


class _Known(NamedTuple):
    run: RunDirectory
    processes: Processes
    version: tuple[int, ...]


class KnownRuns:
    """Remembers the starts that were found: the file that tells of one is written once. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._executed: dict[str, ProcessIdentity] = {}

    def find(self, bundle_path: str, init: ProcessIdentity) -> tuple[RunDirectory, Processes] | None:
        """Return the start that a process was made by, None if none of the bundle's was it. Raises OSError."""
        known = self._known.get(bundle_path)
        if known is not None and known.processes.init == init and known.version == _version_of(known.run):
            return known.run, known.processes
        self.forget(bundle_path)
        for run in list_runs(bundle_path):
            version = _version_of(run)  # before it is read: one that changes meanwhile is read again
            processes = run.read_processes()
            if processes is not None and processes.init == init:
                self._known[bundle_path] = _Known(run, processes, version)
                return run, processes
        return None

    def write(self, bundle_path: str, run: RunDirectory, processes: Processes) -> None:
        """Write down which processes a start has, and remember that. Raises OSError."""
        run.write_processes(processes)
        self._known[bundle_path] = _Known(run, processes, _version_of(run))

    def note_executed(self, bundle_path: str, init: ProcessIdentity) -> None:
        """Remember that a start's program was seen to be executed, whatever becomes of the mark that says so."""
        self._executed[bundle_path] = init

    def was_executed(self, bundle_path: str, init: ProcessIdentity) -> bool:
        """Return whether that was seen here."""
        return self._executed.get(bundle_path) == init

    def forget(self, bundle_path: str) -> None:
        """Forget what was found in a bundle."""
        self._known.pop(bundle_path, None)

    def forget_all(self, bundle_path: str) -> None:
        """Forget what was seen of its starts, too."""
        self.forget(bundle_path)
        self._executed.pop(bundle_path, None)


def _version_of(run: RunDirectory) -> tuple[int, ...]:
    """Return what changes with the file that tells which processes these are, () if there is none. Raises OSError."""
    try:
        found = os.stat(run.join(_PROCESSES))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
