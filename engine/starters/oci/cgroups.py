"""A container's cgroups: which processes are in them, whoever their parent is, and what they use."""

import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache

from limpet.recovery.host import open_pidfd
from limpet.recovery.mounts import open_lines, read_mounts
from limpet.schema.cri import PodSandboxConfig
from limpet.schema.errors import InvalidInputError, quote, quote_path

_ROOT = "/sys/fs/cgroup"
_TOPMOST = 1
"""The inode of a hierarchy's topmost cgroup."""
_V1 = "freezer.state"
_FREEZERS = {"freezer": (_V1, "FROZEN", "THAWED"), "": ("cgroup.freeze", "1", "0")}
"""By controllers, as /proc/PID/cgroup has them: the file, and the words for freezing and thawing."""
_TOLD = {"freezer": "freezer.self_freezing", "": "cgroup.freeze"}
"""The file that says 1 where a cgroup was told to freeze, whatever those above it were told."""
_LOOK_AGAIN_SECONDS = 0.002
_NAME_BYTES, _PARENT_BYTES = 255, 3800
"""The most that a cgroup's name may have for crun, and a path above containers' own, so that the kernel takes each file
below them (PATH_MAX)."""


def require_cgroup_parent(config: PodSandboxConfig) -> None:
    """Raise InvalidInputError for a `cgroup_parent` below which no cgroup can be made."""
    parent = config.linux.cgroup_parent if config.linux else ""
    path = os.path.normpath(f"/{parent.lstrip('/')}")
    names = path.strip("/").split("/")
    why = ""
    if "\n" in parent:
        why = "no cgroup's name has a newline"
    elif any(len(os.fsencode(name)) > _NAME_BYTES for name in names):
        why = f"a name in it has more than {_NAME_BYTES} bytes"
    elif len(os.fsencode(path)) > _PARENT_BYTES:
        why = f"it has more than {_PARENT_BYTES} bytes"
    elif file := next(filter(None, (_find_file(above, names) for above in _list_hierarchies())), ""):
        why = f"{quote_path(file)} is a file"
    if why:
        raise InvalidInputError(f"cgroup_parent {quote(parent)}: {why}")


def _list_hierarchies() -> list[str]:
    with suppress(OSError):
        return [_ROOT, *(each.path for each in os.scandir(_ROOT) if each.is_dir())]
    return []


def _find_file(above: str, names: Sequence[str]) -> str:
    """Return the first on the way below a directory that is no directory, "" if there is none.

    A cgroup that is not there yet will have the files that the topmost has.
    """
    top, is_new = above, False
    for name in names:
        above = os.path.join(top if is_new else above, name)
        if os.path.isdir(above):
            continue
        if os.path.lexists(above):
            return above
        is_new = True
    return ""


def may_make_cgroups() -> bool:
    """Return whether this process may make cgroups in each hierarchy that the runtimes use."""
    above, *places = _list_hierarchies() or [_ROOT]
    if not places or os.path.exists(os.path.join(above, "cgroup.controllers")):  # version 2 alone
        places = [above]
    return all(os.access(place, os.W_OK, effective_ids=True) for place in places)


def make_lines(path: str) -> tuple[str, ...]:
    """Return the lines of /proc/PID/cgroup that a process would have in the cgroup at `path` of each hierarchy.

    `path` is as a runtime takes it: below what is mounted, or where `may_make_beside` says. Raises OSError.
    """
    return tuple(
        f"{number}:{controllers}:"
        + (f"{_find_root(_list_places(controllers)[-1])}{path}" if path[:1] in {"", "/"} else f"{above}/{path}")
        for number, controllers, above in _list_own()
    )


def may_make_beside() -> bool:
    """Return whether this process may make cgroups where runc makes those that are given by a name alone.

    That is below this process's own, and beside it where there is version 2 alone. Raises OSError.
    """
    directories = [
        place + above[len(_find_root(place)) :]
        for _, controllers, above in _list_own()
        for place in _list_places(controllers)
        if os.path.exists(f"{place}/cgroup.procs")
    ]
    needed = [path for each in directories for path in (each, f"{each}/cgroup.procs")]
    return bool(needed) and all(os.access(path, os.W_OK, effective_ids=True) for path in needed)


def _list_own() -> list[tuple[str, str, str]]:
    """Return number and controllers of each hierarchy, and in which cgroup runc makes what is given by a name alone."""
    is_unified = os.path.exists(f"{_ROOT}/cgroup.controllers")
    with open_lines("/proc/self/cgroup") as file:
        found = [line.rstrip("\n").split(":", 2) for line in file]
    return [
        (number, controllers, (os.path.dirname(own) if is_unified and not controllers else own).rstrip("/"))
        for number, controllers, own in found
    ]


def list_directories(lines: Sequence[str], name: str) -> Iterator[tuple[str, str]]:
    """Yield controllers ("" for version 2) and directory of each cgroup that is called `name` and is there.

    `lines` are those of /proc/PID/cgroup (cgroups(7)).
    """
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if os.path.basename(path) != name:  # not the container's own: the runtime made none there
            continue
        for place in _list_places(controllers):
            root = _find_root(place)
            below = path[len(root) :] if f"{path}/".startswith(f"{root}/") else path
            directory = os.path.normpath(f"{place}/{below}")
            if os.path.isdir(directory):
                yield controllers, directory


def _list_places(controllers: str) -> Sequence[str]:
    """Return where the hierarchy of some controllers, "" for version 2, may be mounted."""
    return [f"{_ROOT}/{controllers.removeprefix('name=')}"] if controllers else [_ROOT, f"{_ROOT}/unified"]


def _find_root(place: str) -> str:
    """Return the cgroup that is mounted at a place, "" for the topmost of its hierarchy, as on any host.

    In a container as Docker makes it with version 1 it is the container's, while /proc tells the paths of the host.
    """
    try:
        found = os.stat(place)
    except OSError:
        return ""
    return "" if found.st_ino == _TOPMOST else _read_root(place, found.st_dev, found.st_ino)


@cache
def _read_root(place: str, *_: int) -> str:
    """Return the same, for the device and inode that are there, from what the kernel tells of mounts."""
    roots = [mount.root for mount in read_mounts() if mount.point == place and mount.kind in {"cgroup", "cgroup2"}]
    return roots[-1].rstrip("/") if roots else ""


def list_processes(lines: Sequence[str], name: str) -> set[int]:
    """Return the pids of all processes in the container's cgroups."""
    pids: set[int] = set()
    for _, directory in list_directories(lines, name):
        with suppress(OSError), open(os.path.join(directory, "cgroup.procs"), encoding="utf-8") as file:
            pids |= {int(line) for line in file}
    return pids - {0, os.getpid()}


def signal_processes(lines: Sequence[str], name: str, number: int) -> int:
    """Send a signal to all processes in the container's cgroups, 0 to none; return how many there are."""
    pids = list_processes(lines, name)
    for pid in pids if number else ():
        with suppress(OSError), open_pidfd(pid) as pidfd:
            if pid in list_processes(lines, name):  # asked after it was opened: it is the very process
                signal.pidfd_send_signal(pidfd, number)
    return len(pids)


def remove(lines: Sequence[str], name: str) -> list[str]:
    """Remove the container's cgroups, in which no process is left; return those that cannot be."""
    left = []
    for _, directory in list_directories(lines, name):
        with suppress(OSError):  # as nearly always: it has no others below it
            os.rmdir(directory)
            continue
        for above, _, _ in os.walk(directory, topdown=False):
            try:
                os.rmdir(above)
            except FileNotFoundError:
                continue
            except OSError:
                left.append(above)
    return left


def is_frozen(lines: Sequence[str], name: str) -> bool:
    """Return whether the container's own cgroups are frozen, or about to be: what is above them does not count."""
    return any(_is_set(*each) for each in list_directories(lines, name))


def find_frozen(lines: Sequence[str], name: str) -> str:
    """Return the directory of the cgroup by which the container's processes are frozen, "" if none is.

    It is the container's own, or one above that, which somebody else has frozen.
    """
    return _first_frozen(list_directories(lines, name))


def find_frozen_place(path: str) -> str:
    """Return the directory of a frozen cgroup in which all would be that is made at `path`, "" if there is none."""
    places = (("freezer", "freezer"), ("", "unified"), ("", "."))
    return _first_frozen((controllers, os.path.normpath(f"{_ROOT}/{where}/{path}")) for controllers, where in places)


def _first_frozen(places: Iterable[tuple[str, str]]) -> str:
    for controllers, place in places:
        directory = place
        while directory.startswith(f"{_ROOT}/"):
            if _is_set(controllers, directory):
                return directory
            directory = os.path.dirname(directory)
    return ""


def _is_set(controllers: str, directory: str) -> bool:
    return controllers in _TOLD and _read(directory, _TOLD[controllers]).strip() == "1"


def await_frozen(lines: Sequence[str], name: str, seconds: float) -> bool:
    """Wait until all of the container's processes are frozen, which was asked for; say whether they are.

    A runtime may not wait for that (crun 1.8), and v1 stays amid it until it is asked once more where a process waits
    for a child by vfork(2) that is frozen already. Raises OSError.
    """
    deadline = time.monotonic() + seconds
    pending = [directory for controllers, directory in list_directories(lines, name) if controllers == "freezer"]
    while pending := [each for each in pending if _read(each, _V1).strip() not in {"", "FROZEN"}]:
        if time.monotonic() > deadline:
            return False
        for directory in pending:
            with open(os.path.join(directory, _V1), "w", encoding="utf-8") as file:
                file.write("FROZEN")
        time.sleep(_LOOK_AGAIN_SECONDS)
    return True


def freeze(lines: Sequence[str], name: str) -> None:
    """Freeze the container's own cgroups without the runtime, which takes one for frozen that is so from above.

    Raises OSError.
    """
    _tell_freezers(lines, name, is_wanted=True)


def thaw(lines: Sequence[str], name: str) -> None:
    """Let the container's processes go on, without the runtime, which may hang. Raises OSError.

    One that is not frozen needs nothing, also where cgroups are read-only, as for a unit with `ProtectControlGroups`.
    """
    _tell_freezers(lines, name, is_wanted=False)


def _tell_freezers(lines: Sequence[str], name: str, *, is_wanted: bool) -> None:
    for controllers, directory in list_directories(lines, name):
        file_name, *words = _FREEZERS.get(controllers, ("",))
        path = os.path.join(directory, file_name)
        is_told = controllers in _TOLD and _read(directory, _TOLD[controllers]).strip() == str(int(is_wanted))
        if file_name and os.path.exists(path) and not is_told:
            with open(path, "w", encoding="utf-8") as file:
                file.write(words[0] if is_wanted else words[1])


def lift_quota(lines: Sequence[str], name: str) -> None:
    """Let the container have all the processor time that there is, for which crun has no word. Raises OSError."""
    for controllers, directory in list_directories(lines, name):
        for wanted, file_name, word in (("cpu", "cpu.cfs_quota_us", "-1"), ("", "cpu.max", "max")):
            path = os.path.join(directory, file_name)
            if wanted in controllers.split(",") and os.path.exists(path):
                with open(path, "w", encoding="utf-8") as file:
                    file.write(word)


def measure(lines: Sequence[str], name: str) -> tuple[int | None, int | None, int | None, int | None]:
    """Return processor time in nanoseconds, memory and working set in bytes, and the number of processes.

    None for what is not counted here.
    """
    found: dict[str, int | None] = {}
    for controllers, directory in list_directories(lines, name):
        stat = _fields(_read(directory, "memory.stat"))
        if controllers == "":
            usage = _fields(_read(directory, "cpu.stat")).get("usage_usec")
            found.setdefault("cpu", None if usage is None else usage * 1000)
            found.setdefault("memory", _number(directory, "memory.current"))
            found.setdefault("idle", stat.get("inactive_file"))
            found.setdefault("pids", _number(directory, "pids.current"))
            found = {key: value for key, value in found.items() if value is not None}
        elif controllers == "memory":
            found["memory"], found["idle"] = (
                _number(directory, "memory.usage_in_bytes"),
                stat.get("total_inactive_file"),
            )
        elif controllers == "pids":
            found["pids"] = _number(directory, "pids.current")
        elif "cpuacct" in controllers.split(","):
            found["cpu"] = _number(directory, "cpuacct.usage")
    memory, idle = found.get("memory"), found.get("idle")
    working_set = None if memory is None else max(memory - (idle or 0), 0)
    return found.get("cpu"), memory, working_set, found.get("pids")


def count_memory_kills(lines: Sequence[str], name: str) -> int | None:
    """Return how many of the container's processes the kernel has killed for want of memory; None if nothing tells.

    That are those in its cgroups, which keep the number until they are removed; v1 counts those of each by itself.
    """
    found = None
    for controllers, directory in list_directories(lines, name):
        if controllers == "memory":
            each = [_fields(_read(above, "memory.oom_control")).get("oom_kill") for above, _, _ in os.walk(directory)]
            counts = [count for count in each if count is not None]  # not before Linux 4.13
            found = sum(counts) if counts else found
        elif controllers == "":
            found = _fields(_read(directory, "memory.events")).get("oom_kill", found)
    return found


def _read(directory: str, name: str) -> str:
    try:
        with open(os.path.join(directory, name), encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def _number(directory: str, name: str) -> int | None:
    text = _read(directory, name).strip()
    return int(text) if text.isdigit() else None


def _fields(text: str) -> dict[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
