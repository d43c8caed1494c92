"""The programs that the OCI starter needs: where they are, which versions, and what to install if one is missing."""

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from limpet.engine.starters.oci.child import UNKNOWN
from limpet.engine.starters.oci.command import clean_environment, run
from limpet.schema.errors import UnsupportedError, quote, quote_path

_OLDEST = {"runc": (1, 1), "crun": (1, 0), "conmon": (2, 1)}
"""What was tried; before that, options are missing that are used here."""
_VERSION = re.compile(r"(runc|crun|conmon) version (\d+)\.(\d+)")
_TIMEOUT_SECONDS = 10.0
_UNIFIED = "/sys/fs/cgroup/unified"
_WITHOUT_UNIFIED = (
    "-m", "--propagation", "slave", "sh", "-c", f'umount {_UNIFIED}; exec "$0" "$@"',
)  # fmt: skip
"""crun 1.x refuses hosts where cgroup v2 has a controller beside v1: it gets a mount namespace without v2."""


class Tool(NamedTuple):
    """A program that was found to be one that we know."""

    kind: str
    """runc, crun or conmon."""
    path: str
    version: tuple[int, int]


class Tools:
    """Finds programs, and remembers where, and which version a file is until the file changes. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], Tool] = {}
        self._paths: dict[tuple[str, str], str] = {}

    def find(self, program: str) -> Tool:
        """Return a program by name or path. Raises UnsupportedError: it is missing, too old, or something else."""
        where = clean_environment()["PATH"]
        path, found = self._paths.get((program, where)), None
        if path is not None:
            with suppress(OSError):
                found = os.stat(path)
        if path is None or found is None:
            path = find_program(program)
            if path is None:
                name = os.path.basename(program)
                raise UnsupportedError(f"{program} is not installed; on Debian: apt-get install {name}")
            found = os.stat(path)
            self._paths[program, where] = path
        key = (path, found.st_mtime_ns, found.st_size)
        if key not in self._known:
            self._known[key] = _identify(path)
        return self._known[key]


def find_program(program: str) -> str | None:
    """Return the absolute path of a program by name or path, None if it is not there.

    What runs it works in another directory, where a relative path, also one of PATH, leads to another program.
    """
    path = shutil.which(program, path=clean_environment()["PATH"])
    return path and os.path.abspath(path)


def command_of(runtime: Tool) -> Sequence[str]:
    """Return the command that runs the runtime on this host: its path, behind a wrapper where it needs one.

    Raises UnsupportedError if the wrapper is not installed.
    """
    if runtime.kind == "crun" and has_hybrid_cgroups():
        unshare = find_program("unshare")
        if unshare is None:
            raise UnsupportedError(
                "unshare is not installed, and crun needs it on this host; apt-get install util-linux"
            )
        return (unshare, *_WITHOUT_UNIFIED, runtime.path)
    return (runtime.path,)


def with_oom_score(score: int) -> Sequence[str]:
    """Return what gives itself an oom score and becomes the program that comes next, which hands it on.

    That is nothing where this process has that score, or where util-linux's choom(1) is missing.
    """
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        own = int(file.read())
    choom = find_program("choom") if score != own else None
    return (choom, "-n", str(score), "--") if choom else ()


def has_hybrid_cgroups() -> bool:
    """Return whether cgroup v2 has controllers here beside those of v1."""
    try:
        with open(f"{_UNIFIED}/cgroup.controllers", encoding="utf-8") as file:
            return bool(file.read().split())
    except OSError:
        return False


def has_unified_cgroups() -> bool:
    """Return whether this host has cgroup v2 alone."""
    return os.path.exists("/sys/fs/cgroup/cgroup.controllers")


def has_controller(name: str) -> bool:
    """Return whether a controller of cgroups is where the runtimes look for it: in version 1 if that is there."""
    if not has_unified_cgroups():
        return os.path.isdir(f"/sys/fs/cgroup/{name}")
    with open("/sys/fs/cgroup/cgroup.controllers", encoding="ascii") as file:
        return name in file.read().split()


def _identify(path: str) -> Tool:
    try:
        outcome = run([path, "--version"], timeout=_TIMEOUT_SECONDS)
        if outcome.code == UNKNOWN:  # the first that the host has waited for: the next is held before it begins
            outcome = run([path, "--version"], timeout=_TIMEOUT_SECONDS)
    except OSError as error:
        raise UnsupportedError(f"{quote_path(path)} cannot be executed: {error.strerror}") from error
    text = outcome.output.decode(errors="replace")
    found = _VERSION.match(text)
    if outcome.code != 0 or found is None:
        said = quote(text.split("\n")[0]) if text else outcome.problem
        raise UnsupportedError(f"{quote_path(path)} --version: neither runc, crun nor conmon says {said}")
    tool = Tool(found[1], path, (int(found[2]), int(found[3])))
    oldest = _OLDEST[tool.kind]
    if tool.version < oldest:
        raise UnsupportedError(
            f"{quote_path(path)} is {tool.kind} {found[2]}.{found[3]}; {oldest[0]}.{oldest[1]} or newer is needed"
        )
    return tool
