"""Other ways to run a program: a child process, bwrap, the OCI runtimes runc and crun, and Podman with these.

None of them keeps state that survives a power cut. Each runs /bin/true, as the engine does.
"""

import ctypes
import os
import select
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import IO, ClassVar

import msgspec

from limpet.benchmarks.contenders import UnavailableError

PROGRAM = "/bin/true"
SLEEPER = ("/bin/sleep", "100000")
"""What those run that are kept."""
_CLONE_NEWNS = 0x20000  # linux/sched.h
_MS_REC_PRIVATE = 0x4000 | 0x40000  # linux/mount.h: MS_REC | MS_PRIVATE
_UNIFIED = "/sys/fs/cgroup/unified"
HOST_DIRECTORIES = tuple(path for path in ("/usr", "/bin", "/lib", "/lib64") if os.path.isdir(path))
"""What a container of an OCI runtime sees of the host."""
_END_TIMEOUT_MS = 30_000
_MOST_SAID = 300


class Other(ABC):
    """One of them, at work in a directory of its own; threads may share it."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)  # a runtime works in the bundle, where a relative one is another
        self._numbers = count()

    @abstractmethod
    def live(self) -> float | None:
        """Run the program to its end and clear up. Return how many seconds its start took, None if that is not told.

        Raises UnavailableError if it cannot be done here.
        """

    def choose_id(self) -> str:
        """Return an id that no other container here has."""
        return f"limpet-bench-{os.getpid()}-{next(self._numbers)}"

    def hold(self, count: int) -> None:  # noqa: B027  # most of them keep nothing
        """Have so many run while the others live, if it keeps what it has started. Raises UnavailableError."""

    def reopen(self) -> int | None:
        """Ask anew, as after a restart, for all that it has started; return how many run, None if it keeps nothing.

        Raises UnavailableError.
        """
        return None

    def close(self) -> None:  # noqa: B027  # most of them leave nothing but files
        """Remove what it has outside of its directory."""


class Child(Other):
    """subprocess.Popen."""

    def live(self) -> float:
        """Start it, and wait for its end. The start is over once the program was executed."""
        began = time.perf_counter()
        with subprocess.Popen([PROGRAM], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL):
            return time.perf_counter() - began


class Bwrap(Other):
    """bubblewrap, with namespaces of its own and the host's files."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self._command = [find_program("bwrap"), "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", PROGRAM]

    def live(self) -> None:
        """Run it to its end."""
        run_command(self._command)


class OciRuntime(Other):
    """create, start, delete as a container engine has them done, with the host's files bound into an empty root."""

    program: ClassVar[str]

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self._command = [find_program(self.program), "--root", os.path.join(self.directory, "root")]
        self._bundle = self._make_bundle("bundle", PROGRAM)
        self._held: list[str] = []

    def _make_bundle(self, name: str, *args: str) -> str:
        path = os.path.join(self.directory, name)
        os.makedirs(os.path.join(path, "rootfs"))
        with open(os.path.join(path, "config.json"), "wb") as file:
            file.write(msgspec.json.encode(_make_config(args)))
        return path

    def live(self) -> None:
        """Create and start a container, wait for its end, and delete it."""
        key = self.choose_id()
        pid_file = os.path.join(self.directory, key)
        run_command([*self._command, "create", "--bundle", self._bundle, "--pid-file", pid_file, key])
        try:
            with open(pid_file, encoding="ascii") as file:
                pidfd = os.pidfd_open(int(file.read()))
            run_command([*self._command, "start", key])
            wait_for_end(pidfd)
        finally:
            run_command([*self._command, "delete", "--force", key])
        os.unlink(pid_file)

    def hold(self, count: int) -> None:
        """Create and start so many that run."""
        bundle = self._make_bundle("held", *SLEEPER)
        for _ in range(count):
            self._held.append(key := self.choose_id())
            run_command([*self._command, "create", "--bundle", bundle, key])
            run_command([*self._command, "start", key])

    def reopen(self) -> int:
        """Ask for the list of all, with their states: there is no more of a restart."""
        return read_command([*self._command, "list"]).count(" running ")

    def close(self) -> None:
        """Delete those that run."""
        for key in self._held:
            run_command([*self._command, "delete", "--force", key])


class Runc(OciRuntime):
    """runc."""

    program = "runc"


class Crun(OciRuntime):
    """crun. On a host with both versions of cgroups it is given a mount table with the first only: it refuses both."""

    program = "crun"

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        leave_out_unified()


class UnderPodman(Other):
    """Podman, which has a runtime make containers under conmon, too, and keeps its own state of them.

    It has no manager that stays: each command opens its state anew. Its containers keep no logs, as limpet's here.
    """

    program: ClassVar[str]

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        programs = [find_program("podman"), f"--runtime={find_program(self.program)}"]
        self._run = tempfile.mkdtemp(prefix="limpet-bench-")  # it takes no longer a path than 50 characters
        self._command = [
            *programs, "--storage-driver=vfs", "--cgroup-manager=cgroupfs",
            f"--root={os.path.join(self.directory, 'root')}", f"--runroot={self._run}/runroot",
            f"--tmpdir={self._run}/state",
        ]  # fmt: skip
        self._rootfs = os.path.join(self.directory, "rootfs")
        os.mkdir(self._rootfs)

    def live(self) -> float:
        """Create and start a container, wait for its end, and remove it. The start is over once it was started."""
        key = self._create(PROGRAM)
        began = time.perf_counter()
        run_command([*self._command, "start", key])
        took = time.perf_counter() - began
        run_command([*self._command, "wait", key])
        run_command([*self._command, "rm", key])
        return took

    def _create(self, *args: str) -> str:
        binds = [f"--volume={path}:{path}:ro" for path in HOST_DIRECTORIES]
        limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"]  # its own defaults need a capability
        options = [*binds, *limits, "--network=none", "--log-driver=none", "--rootfs", self._rootfs]
        return read_command([*self._command, "create", *options, *args]).strip()

    def hold(self, count: int) -> None:
        """Create and start so many that run."""
        for _ in range(count):
            run_command([*self._command, "start", self._create(*SLEEPER)])

    def reopen(self) -> int:
        """Ask for all that run, which has it open its state anew."""
        return len(read_command([*self._command, "ps", "--quiet"]).split())

    def close(self) -> None:
        """Remove those that run."""
        try:
            run_command([*self._command, "rm", "--all", "--force", "--time=0"])
        finally:
            self._await_cleanup()
            shutil.rmtree(self._run, ignore_errors=True)

    def _await_cleanup(self) -> None:
        """Wait until no process of it is left: each conmon has it clean up after an end, which nobody waits for."""
        deadline = time.monotonic() + _END_TIMEOUT_MS / 1000
        while _has_process(self._run) and time.monotonic() < deadline:
            time.sleep(0.05)


class RuncUnderPodman(UnderPodman):
    """Podman with runc."""

    program = "runc"


class CrunUnderPodman(UnderPodman):
    """Podman with crun, which is given one version of cgroups, as crun alone is."""

    program = "crun"

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        leave_out_unified()


OTHERS: Mapping[str, type[Other]] = {
    "popen": Child,
    "bwrap": Bwrap,
    "runc": Runc,
    "crun": Crun,
    "podman-runc": RuncUnderPodman,
    "podman-crun": CrunUnderPodman,
}


def find_program(program: str) -> str:
    """Return the path of a program. Raises UnavailableError if it is not installed."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        raise UnavailableError(f"{program} is not installed")
    return path


def run_command(command: Sequence[str]) -> None:
    """Run a command to its end. Raises UnavailableError with what it said if it fails."""
    _run(command, subprocess.DEVNULL)


def read_command(command: Sequence[str]) -> str:
    """Run a command to its end, and return what it prints. Raises UnavailableError with what it said if it fails."""
    with tempfile.TemporaryFile() as printed:
        _run(command, printed)
        printed.seek(0)
        return printed.read().decode(errors="replace")


def _run(command: Sequence[str], stdout: int | IO[bytes]) -> None:
    with tempfile.TemporaryFile() as said:  # not a pipe: a container inherits it, and would keep that open
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=said, check=False)
        if done.returncode:
            said.seek(0)
            name, text = os.path.basename(command[0]), said.read(_MOST_SAID).decode(errors="replace").strip()
            raise UnavailableError(f"{name} does not work here: exit status {done.returncode}: {text}")


def _has_process(word: str) -> bool:
    """Say whether a process has a word in its command line."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
            if word.encode() in file.read():
                return True
    return False


def wait_for_end(pidfd: int) -> None:
    """Wait until a process has ended, and close its pidfd. Raises UnavailableError."""
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(_END_TIMEOUT_MS):
            raise UnavailableError(f"{PROGRAM} has not ended after {_END_TIMEOUT_MS / 1000:g} s")
    finally:
        os.close(pidfd)


def _make_config(args: Sequence[str]) -> dict[str, object]:
    """Return a config.json: https://github.com/opencontainers/runtime-spec/blob/main/config.md."""
    binds = [
        {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]} for path in HOST_DIRECTORIES
    ]
    return {
        "ociVersion": "1.0.2",
        "process": {"args": list(args), "env": ["PATH=/usr/bin:/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            *binds,
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]},
    }


def leave_out_unified() -> None:
    """Give this process, which is the cell's own, one version of cgroups only, as crun needs it.

    Raises UnavailableError.
    """
    if not os.path.ismount(_UNIFIED):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(_CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None)
        or libc.umount2(os.fsencode(_UNIFIED), 0)
    ):
        raise UnavailableError(f"{_UNIFIED}: {os.strerror(ctypes.get_errno())}; root may leave it out")
