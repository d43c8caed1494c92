"""What a container's limits are in the files of cgroups: one table for cgroup v1, one for v2. Pure: no I/O.

File names and ranges are the kernel's (Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst), the meaning of the
request is the CRI's and the OCI runtime specification's. What the kernel checks by itself is left to it.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from limpet.schema.cri import LinuxContainerResources

UNLIMITED = -1
"""As the OCI runtime specification writes "no limit" for memory, swap and quota."""
SHARES_MIN, SHARES_MAX = 2, 1 << 18
"""What cgroup v1's cpu.shares keeps; it clamps the rest without a word."""
_DEFAULT_PERIOD_US = 100_000
_PAGE_SIZE = re.compile(r"[1-9][0-9]*[KMG]B", re.ASCII)
_UNIFIED_KEY = re.compile(r"([a-z][a-z0-9_]*)(?:\.[A-Za-z0-9_-]+)+", re.ASCII)
_CORE_LIMITS = {"cgroup.max.depth", "cgroup.max.descendants"}


class Setting(NamedTuple):
    """One line to write into one file of the container's cgroup."""

    field: str
    """Of LinuxContainerResources, which this carries out."""
    controller: str
    """Whose file it is; "" for the files that every cgroup v2 has."""
    file: str
    value: str
    needs: str = ""
    """A field without which this means something else; where that is not applied, neither is this."""
    effective: str = ""
    """The file that tells what the kernel made of it, where a write is accepted and then not followed."""


class _Row(NamedTuple):
    field: str
    controller: str
    file: str
    convert: Callable[[LinuxContainerResources], str]
    needs: str = ""
    effective: str = ""


def shares_to_weight(shares: int) -> int:
    """Return the cpu.weight (1 to 10000) of cgroup v2 for cpu.shares (2 to 262144) of v1.

    The curve that runc 1.3.2 and crun 1.23 use: it takes minimum, default (1024, 100) and maximum to each other.
    """
    octaves = math.log2(shares)
    return math.ceil(10 ** ((octaves * octaves + 125 * octaves - 126) / 612))


def _require_line(text: str) -> str:
    if not text.isprintable():  # the kernel reads to the first NUL or end of line, and takes that for all
        raise ValueError(f"{text!r} has characters in it that cannot be printed")
    return text


def _shares(requested: LinuxContainerResources) -> int:
    if not SHARES_MIN <= requested.cpu_shares <= SHARES_MAX:
        raise ValueError(f"cpu shares {requested.cpu_shares} are not from {SHARES_MIN} to {SHARES_MAX}")
    return requested.cpu_shares


def _limit(value: int) -> str:
    return "max" if value == UNLIMITED else str(value)


def _cpu_max(requested: LinuxContainerResources) -> str:
    quota = _limit(requested.cpu_quota or UNLIMITED)
    return f"{quota} {requested.cpu_period or _DEFAULT_PERIOD_US}"


def _swap_max(requested: LinuxContainerResources) -> str:
    """Return the limit of swap alone; the CRI's is of memory and swap together."""
    both, memory = requested.memory_swap_limit_in_bytes, requested.memory_limit_in_bytes
    if both == UNLIMITED:
        return "max"
    if memory <= 0:
        raise ValueError(f"memory and swap together are limited to {both} bytes; set a limit of memory as well")
    if both < memory:
        raise ValueError(f"memory and swap together, {both} bytes, are less than memory alone, {memory}")
    return str(both - memory)


# A field whose file depends on another's stands after it.
_V1 = (
    _Row("cpu_shares", "cpu", "cpu.shares", lambda r: str(_shares(r))),
    _Row("cpu_period", "cpu", "cpu.cfs_period_us", lambda r: str(r.cpu_period)),
    _Row("cpu_quota", "cpu", "cpu.cfs_quota_us", lambda r: str(r.cpu_quota), needs="cpu_period"),
    _Row("memory_limit_in_bytes", "memory", "memory.limit_in_bytes", lambda r: str(r.memory_limit_in_bytes)),
    _Row(
        "memory_swap_limit_in_bytes",
        "memory",
        "memory.memsw.limit_in_bytes",
        lambda r: str(r.memory_swap_limit_in_bytes),
        needs="memory_limit_in_bytes",
    ),
    _Row("cpuset_cpus", "cpuset", "cpuset.cpus", lambda r: r.cpuset_cpus),
    _Row("cpuset_mems", "cpuset", "cpuset.mems", lambda r: r.cpuset_mems),
)
_V2 = (
    _Row("cpu_shares", "cpu", "cpu.weight", lambda r: str(shares_to_weight(_shares(r)))),
    _Row("cpu_period", "cpu", "cpu.max", _cpu_max),
    _Row("cpu_quota", "cpu", "cpu.max", _cpu_max),
    _Row("memory_limit_in_bytes", "memory", "memory.max", lambda r: _limit(r.memory_limit_in_bytes)),
    _Row("memory_swap_limit_in_bytes", "memory", "memory.swap.max", _swap_max, needs="memory_limit_in_bytes"),
    _Row("cpuset_cpus", "cpuset", "cpuset.cpus", lambda r: r.cpuset_cpus, effective="cpuset.cpus.effective"),
    _Row("cpuset_mems", "cpuset", "cpuset.mems", lambda r: r.cpuset_mems, effective="cpuset.mems.effective"),
)
# Reservations and page faults are counted apart; a limit has to hold for both.
_HUGETLB_V1 = ("hugetlb.{}.rsvd.limit_in_bytes", "hugetlb.{}.limit_in_bytes")
_HUGETLB_V2 = ("hugetlb.{}.rsvd.max", "hugetlb.{}.max")


class Refusals(dict[str, str]):
    """Field to the reason, or reasons, why it is not applied."""

    def add(self, field: str, reason: str) -> None:
        """Add a reason, unless it was given before."""
        before = self.get(field)
        if before is None:
            self[field] = reason
        elif reason not in before:
            self[field] = f"{before}; {reason}"


def requested_fields(requested: LinuxContainerResources) -> tuple[str, ...]:
    """Return the names of the fields that ask for something: 0, "" and empty do not."""
    return tuple(name for name in requested.__struct_fields__ if getattr(requested, name))


def make_settings(
    requested: LinuxContainerResources, v1_controllers: Collection[str]
) -> tuple[list[Setting], Refusals]:
    """Return what to write, in order, and the fields that cannot be written down at all, with the reason.

    `v1_controllers` are on a cgroup v1 hierarchy; all others are taken to be on v2. oom_score_adj is no cgroup's.
    """
    settings: list[Setting] = []
    refusals = Refusals()
    asked = requested_fields(requested)
    for version, rows in ((1, _V1), (2, _V2)):
        for row in rows:
            if row.field not in asked or (row.controller in v1_controllers) is not (version == 1):
                continue
            try:
                value = _require_line(row.convert(requested))
            except ValueError as error:
                refusals.add(row.field, str(error))
            else:
                settings.append(Setting(row.field, row.controller, row.file, value, row.needs, row.effective))
    settings += _plan_hugepages(requested, "hugetlb" in v1_controllers, refusals)
    settings += _plan_unified(requested, v1_controllers, {setting.file for setting in settings}, refusals)
    return settings, refusals


def _plan_hugepages(requested: LinuxContainerResources, is_v1: bool, refusals: Refusals) -> Iterator[Setting]:
    for each in requested.hugepage_limits:
        if not _PAGE_SIZE.fullmatch(each.page_size):
            refusals.add("hugepage_limits", f"{each.page_size!r} is no page size such as 64KB, 2MB or 1GB")
            continue
        for file in _HUGETLB_V1 if is_v1 else _HUGETLB_V2:
            yield Setting("hugepage_limits", "hugetlb", file.format(each.page_size), str(each.limit))


def _plan_unified(
    requested: LinuxContainerResources, v1_controllers: Collection[str], taken: Collection[str], refusals: Refusals
) -> Iterator[Setting]:
    for key, value in requested.unified.items():
        try:
            controller = _require_key(key, v1_controllers, taken)
            for line in value.rstrip("\n").split("\n"):  # the kernel takes one line in one write
                yield Setting("unified", controller, key, _require_line(line))
        except ValueError as error:
            refusals.add("unified", f"{key!r}: {error}")


def _require_key(key: str, v1_controllers: Collection[str], taken: Collection[str]) -> str:
    """Return the controller of a file of cgroup v2, "" for none; raise ValueError for what is no limit to set here."""
    match = _UNIFIED_KEY.fullmatch(key)
    if not match:
        raise ValueError("this is no name of a cgroup v2 file such as memory.high")
    controller = match[1]
    if key in _CORE_LIMITS:
        return ""
    if controller == "cgroup":  # cgroup.procs, cgroup.freeze, cgroup.kill
        raise ValueError("this moves, freezes or kills processes and is no limit")
    if controller in v1_controllers:
        raise ValueError(f"this is for cgroup v2, and controller {controller!r} is on cgroup v1 here")
    if key in taken:
        raise ValueError("another field of the request sets this")
    return controller
