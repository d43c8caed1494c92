"""The limits that are in force in a container's cgroups: kept while a runtime changes them, and put back if it fails.

A runtime sets one after the other. If it fails at one, or is killed, those before it are the new ones; runc puts back
what it knows of, which is not what nobody ever set. What is kept is a file of the start, so that an engine which comes
after a kill finds what was in force before.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch

import msgspec

from limpet.engine.starters.oci.cgroups import list_directories
from limpet.engine.starters.oci.run_directory import RunDirectory
from limpet.engine.state.durable import write_unflushed
from limpet.recovery.files import read_small_file
from limpet.schema.decoders import make_decoder

_NAMES: Mapping[str, Sequence[str]] = {
    "cpu": ("cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us"),
    "cpuset": ("cpuset.cpus", "cpuset.mems"),
    "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    "hugetlb": ("hugetlb.*.limit_in_bytes",),
    "": ("cpu.weight", "cpu.max", "cpuset.cpus", "cpuset.mems", "memory.max", "memory.swap.max", "hugetlb.*.max"),
}
"""By controller, "" for version 2: the files that a change of limits may write in."""
_FILE = "limits-before.json"
_MOST_BYTES = 64 << 10
_kept = make_decoder(dict[str, str])
_TRIES = 3
"""Some are accepted only once another is as it was, such as memory, and memory and swap together."""


def keep_limits(run: RunDirectory, lines: Sequence[str], name: str, others: Sequence[str]) -> dict[str, str]:
    """Return what is in force, by path, or was before an engine was killed amid a change; it is written down.

    `others` are more files of cgroup v2. Raises OSError.
    """
    paths = list(_list_files(lines, name, others))
    with suppress(FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        kept = _kept.decode(read_small_file(run.join(_FILE), _MOST_BYTES))
        return {path: text for path, text in kept.items() if path in paths}
    found = {path: text for path in paths if (text := _read(path))}
    write_unflushed(run.join(_FILE), msgspec.json.encode(found))
    return found


def forget_limits(run: RunDirectory) -> None:
    """Remove what `keep_limits` has written."""
    with suppress(FileNotFoundError):
        os.unlink(run.join(_FILE))


def put_back(kept: Mapping[str, str]) -> dict[str, str]:
    """Have what was kept be in force again; return what is instead, by path, where that cannot be."""
    for _ in range(_TRIES):
        for path, text in kept.items():
            if _read(path) not in {text, ""}:
                with suppress(OSError), open(path, "w", encoding="utf-8") as file:
                    file.write(text)
    return {path: found for path, text in kept.items() if (found := _read(path)) not in {text, ""}}


def _list_files(lines: Sequence[str], name: str, others: Sequence[str]) -> Iterator[str]:
    for controllers, directory in list_directories(lines, name):
        patterns = [each for one in controllers.split(",") for each in _NAMES.get(one, ())]
        patterns += [] if controllers else others
        for entry in sorted(os.listdir(directory)) if patterns else ():
            if any(fnmatch(entry, pattern) for pattern in patterns):
                yield os.path.join(directory, entry)


def _read(path: str) -> str:
    """Return what a file says, with its newline; "" if it cannot be read."""
    with suppress(OSError), open(path, encoding="utf-8") as file:
        return file.read()
    return ""
