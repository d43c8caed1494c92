"""Other ways to run a program: a child process, bwrap, and the OCI runtimes runc and crun.

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
from itertools import count
from typing import ClassVar

import msgspec

from limpet.benchmarks.contenders import UnavailableError

PROGRAM = "/bin/true"
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

    @abstractmethod
    def live(self) -> float | None:
        """Run the program to its end and clear up. Return how many seconds its start took, None if that is not told.

        Raises UnavailableError if it cannot be done here.
        """

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
        self._bundle = os.path.join(self.directory, "bundle")
        os.makedirs(os.path.join(self._bundle, "rootfs"))
        with open(os.path.join(self._bundle, "config.json"), "wb") as file:
            file.write(msgspec.json.encode(_make_config()))
        self._numbers = count()

    def live(self) -> None:
        """Create and start a container, wait for its end, and delete it."""
        key = f"limpet-bench-{os.getpid()}-{next(self._numbers)}"
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


class Runc(OciRuntime):
    """runc."""

    program = "runc"


class Crun(OciRuntime):
    """crun. On a host with both versions of cgroups it is given a mount table with the first only: it refuses both."""

    program = "crun"

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        leave_out_unified()


OTHERS: Mapping[str, type[Other]] = {"popen": Child, "bwrap": Bwrap, "runc": Runc, "crun": Crun}


def find_program(program: str) -> str:
    """Return the path of a program. Raises UnavailableError if it is not installed."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        raise UnavailableError(f"{program} is not installed")
    return path


def run_command(command: Sequence[str]) -> None:
    """Run a command to its end. Raises UnavailableError with what it said if it fails."""
    with tempfile.TemporaryFile() as said:  # not a pipe: a container inherits it, and would keep that open
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, check=False)
        if done.returncode:
            said.seek(0)
            name, text = os.path.basename(command[0]), said.read(_MOST_SAID).decode(errors="replace").strip()
            raise UnavailableError(f"{name} does not work here: exit status {done.returncode}: {text}")


def wait_for_end(pidfd: int) -> None:
    """Wait until a process has ended, and close its pidfd. Raises UnavailableError."""
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(_END_TIMEOUT_MS):
            raise UnavailableError(f"{PROGRAM} has not ended after {_END_TIMEOUT_MS / 1000:g} s")
    finally:
        os.close(pidfd)


def _make_config() -> dict[str, object]:
    """Return a config.json: https://github.com/opencontainers/runtime-spec/blob/main/config.md."""
    binds = [
        {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]} for path in HOST_DIRECTORIES
    ]
    return {
        "ociVersion": "1.0.2",
        "process": {"args": [PROGRAM], "env": ["PATH=/usr/bin:/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
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
