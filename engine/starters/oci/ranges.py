"""Which limits are refused before a runtime sees them: values that the kernel would not take, or would take otherwise.

Of a number out of range, one runtime refuses the container when it starts, another takes the nearest in silence, and
what is negative may become a very large one. So they never get any.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from limpet.schema.cri import LinuxContainerResources
from limpet.schema.errors import InvalidInputError, quote

_UNLIMITED = -1
_MOST = 2**63 - 1
_RANGES: Mapping[str, tuple[int, int]] = {
    "oom_score_adj": (-1000, 1000),
    "cpu_shares": (2, 1 << 18),
    "cpu_period": (1_000, 1_000_000),
    "cpu_quota": (1_000, (1 << 44) - 1),
    "memory_limit_in_bytes": (1, _MOST),
    "memory_swap_limit_in_bytes": (1, _MOST),
}
"""What the kernel takes; 0 stands for "not specified"."""
_MAY_BE_UNLIMITED = ("cpu_quota", "memory_limit_in_bytes", "memory_swap_limit_in_bytes")
_ONLINE = {"cpuset_cpus": "/sys/devices/system/cpu/online", "cpuset_mems": "/sys/devices/system/node/online"}
_REGION = re.compile(r" *([0-9]{1,9})(?:-([0-9]{1,9})(?::([0-9]{1,9})/([1-9][0-9]{0,8}))?)? *", re.ASCII)
"""Of a list as the kernel reads it (cpuset(7)): one, from one to another, and of these so many in each group."""
_MOST_NUMBERS = 1 << 16
_UNIFIED = re.compile(r"(?!cgroup\.)[a-z][a-z0-9_]*(\.[A-Za-z0-9_-]+)+|cgroup\.max\.(depth|descendants)", re.ASCII)
"""Files of cgroup v2 that are limits: those of controllers, and two of the others, which move, freeze or kill."""
_PAGES = "/sys/kernel/mm/hugepages"
_LEAST_MEMORY = {"runc": 2 << 20, "crun": 128 << 10}
"""With less no start came to the program, in 20 tries of each size (runc 1.1, crun 1.8). With runc each did from
2.5 MiB on; where it cannot execute its own file from a read-only mount, it needs more by the size of that."""


def require_limits(asked: LinuxContainerResources) -> None:
    """Raise InvalidInputError, with the field's name, for a limit that cannot be put into force as it is."""
    for name, (least, most) in _RANGES.items():
        value = getattr(asked, name)
        may_be_unlimited = name in _MAY_BE_UNLIMITED
        if value == 0 or (value == _UNLIMITED and may_be_unlimited) or least <= value <= most:
            continue
        other = f", or {_UNLIMITED} for no limit" if may_be_unlimited else ""
        raise InvalidInputError(f"resources.{name} {value}: a number from {least} to {most} is needed{other}")
    both, memory = asked.memory_swap_limit_in_bytes, asked.memory_limit_in_bytes
    if both > 0 and not 0 < memory <= both:
        raise InvalidInputError(
            f"resources.memory_swap_limit_in_bytes {both}: it is of memory and swap together, so memory_limit_in_bytes"
            f" {memory} must be given, and be no more"
        )
    for key, text in asked.unified.items():
        if not _UNIFIED.fullmatch(key):
            raise InvalidInputError(f"resources.unified {quote(key)}: it is no limit of cgroup v2 such as memory.high")
        if not text.strip() or not text.replace("\t", " ").isprintable():  # of which the kernel would read nothing
            raise InvalidInputError(f"resources.unified {quote(key)}: a value in one line is needed, not {quote(text)}")
    for name, path in _ONLINE.items():
        _require_online(name, getattr(asked, name), path)
    _require_page_sizes(asked)


def require_room(limits: Mapping[str, Any], runtime: str) -> None:
    """Raise InvalidInputError for a limit of memory with which no start comes to the program: runc, crun need some.

    `limits` are the runtime-spec's `resources`: those that will be in force.
    """
    least, limit = _LEAST_MEMORY[runtime], limits.get("memory", {}).get("limit", _UNLIMITED)
    if 0 < limit < least:
        raise InvalidInputError(
            f"resources.memory_limit_in_bytes {limit}: {runtime} itself needs more to start the container; {least} or"
            " more is needed"
        )


def _require_online(name: str, text: str, path: str) -> None:
    if not text:
        return
    try:
        wanted = _parse(text)
    except ValueError as error:
        raise InvalidInputError(f"resources.{name} {quote(text)}: {error}; a list such as 0-2,5 is needed") from error
    with suppress(OSError), open(path, encoding="ascii") as file:  # a kernel without NUMA has no nodes to list
        here = file.read().strip()
        if missing := sorted(wanted - _parse(here)):
            raise InvalidInputError(f"resources.{name} {quote(text)}: this host has {here}, and no {missing[0]}")


def _parse(text: str) -> set[int]:
    """Return the numbers in a list of the kernel's. Raises ValueError."""
    found: set[int] = set()
    for region in filter(None, text.split(",")):
        match = _REGION.fullmatch(region)
        if match is None:
            raise ValueError(f"{region!r} is no number and no range")
        first, last, used, group = (int(each) if each else 0 for each in match.groups())
        last = last if match[2] else first
        if last < first or last >= _MOST_NUMBERS:
            raise ValueError(f"{region!r} is no range")
        found |= {each for each in range(first, last + 1) if not group or (each - first) % group < used}
    if not found:
        raise ValueError("there is no number in it")
    return found


def _require_page_sizes(asked: LinuxContainerResources) -> None:
    sizes = [each.page_size for each in asked.hugepage_limits]
    here = _list_page_sizes() if sizes else ()
    for size in sizes:
        if size not in here:
            raise InvalidInputError(
                f"resources.hugepage_limits {quote(size)}: this host has huge pages of {', '.join(here) or 'no size'}"
            )
        if sizes.count(size) > 1:
            raise InvalidInputError(f"resources.hugepage_limits {quote(size)}: it is there twice; give one limit")


def _list_page_sizes() -> tuple[str, ...]:
    """Return the sizes of this host's huge pages, as the files of cgroups are named by them."""
    found = []
    with suppress(OSError):
        for name in os.listdir(_PAGES):
            kilobytes = int(name.removeprefix("hugepages-").removesuffix("kB"))
            shift, unit = next((each for each in ((20, "GB"), (10, "MB")) if kilobytes >> each[0]), (0, "KB"))
            found.append(f"{kilobytes >> shift}{unit}")
    return tuple(sorted(found))
