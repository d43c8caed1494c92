"""A container's limits, put into force through cgroups where this process may; what is not, is said with the reason.

The container's cgroup `limpet-ID` is made below the engine's own, so that it never escapes limits that hold for the
engine. cgroup v2 gives controllers only to children of a cgroup without processes: there the engine has to run
in the root cgroup, or in a subgroup of one that systemd delegated (Delegate=yes with DelegateSubgroup=), a user's own
systemd included. No other process is moved, and no limit of another cgroup is changed.
"""

import errno
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from limpet.engine.starters.process.cgroups.files import read_text, write_line
from limpet.engine.starters.process.cgroups.hierarchies import Cgroups, read_cgroups
from limpet.engine.starters.process.cgroups.parents import find_parents
from limpet.engine.starters.process.cgroups.settings import Refusals, Setting, make_settings, requested_fields
from limpet.engine.state.presence import is_there
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.file_name import file_name
from limpet.schema.status import Resources

_LEAVE_TIMEOUT_SECONDS = 0.5


def apply_limits(
    container_id: str,
    pid: int,
    requested: LinuxContainerResources,
    beside: int = 0,
    note: Callable[[str], object] = lambda _: None,
) -> Resources:
    """Limit the process `pid` and all that it will start, and say of each field asked for what became of it.

    The cgroups are made below those of the process `beside`, 0 for this one, each of which is given to `note` before.
    For a process that is held: nothing of the container's has run, so nothing runs unlimited. What the kernel or a
    permission refuses is in `unapplied`, with the file and the kernel's words. A kill midway leaves an empty cgroup,
    which the next call for this id, or `remove_limits`, removes. Raises InvalidInputError for an invalid id.
    """
    name = _name(container_id)
    asked = requested_fields(requested)
    refusals = Refusals()
    if set(asked) - {"oom_score_adj"}:
        refusals = _apply_through_cgroups(name, pid, requested, beside, note)
    if requested.oom_score_adj:
        try:
            write_line(f"/proc/{pid}/oom_score_adj", str(requested.oom_score_adj))
        except OSError as error:
            refusals.add("oom_score_adj", _describe(error))
    return Resources(
        requested=requested,
        applied=tuple(field for field in asked if field not in refusals),
        unapplied=dict(refusals),
    )


def remove_limits(container_id: str, beside: int = 0, noted: Collection[str] = ()) -> tuple[str, ...]:
    """Remove the container's cgroups; return those that are left, each with the reason, or nothing.

    A cgroup with processes in it is left alone, after half a second for killed ones to leave it. Looks below the
    cgroups that were `noted`, and those that the process `beside` is in now. Raises InvalidInputError for an invalid
    id.
    """
    name = _name(container_id)
    left = []
    try:
        parents = find_parents(beside, noted)
    except OSError as error:
        return (_describe(error),)
    for parent in parents:
        try:
            _remove(f"{parent}/{name}")
        except OSError as error:
            left.append(_describe(error))
    return tuple(left)


def was_out_of_memory(container_id: str, beside: int = 0, noted: Collection[str] = ()) -> bool:
    """Say whether the kernel has killed a process of the container for want of memory, its limit's or the host's.

    By the counter `oom_kill` of memory.events (cgroup v2) or memory.oom_control (cgroup v1, Linux 4.13), which stays
    until the cgroup is removed.
    """
    name = _name(container_id)
    with suppress(OSError):
        for parent in find_parents(beside, noted):
            for file in ("memory.events", "memory.oom_control"):
                with suppress(OSError):
                    fields = dict(line.split() for line in read_text(os.path.join(parent, name, file)).splitlines())
                    if int(fields.get("oom_kill", 0)):
                        return True
    return False


def _name(container_id: str) -> str:
    return f"limpet-{file_name(container_id)}"


def _apply_through_cgroups(
    name: str, pid: int, requested: LinuxContainerResources, beside: int, note: Callable[[str], object]
) -> Refusals:
    try:
        own = read_cgroups(beside)
    except OSError as error:
        fields = requested_fields(requested)
        return Refusals({field: _describe(error) for field in fields if field != "oom_score_adj"})
    settings, refusals = make_settings(requested, own.v1)
    in_cgroup: dict[str, list[Setting]] = {}
    for setting in settings:
        try:
            parent = own.v1.get(setting.controller) or _open_v2_parent(own, setting.controller)
        except OSError as error:
            refusals.add(setting.field, _describe(error))
        else:
            in_cgroup.setdefault(os.path.join(parent, name), []).append(setting)
    for path, each in in_cgroup.items():
        note(os.path.dirname(path))
        _fill(path, each, pid, refusals)
    return refusals


def _open_v2_parent(own: Cgroups, controller: str) -> str:
    """Return the cgroup v2 whose children this process may limit with `controller`. Raises OSError if none."""
    parent = own.find_v2_parent()
    if not controller or controller in read_text(os.path.join(parent, "cgroup.subtree_control")).split():
        return parent
    available = os.path.join(parent, "cgroup.controllers")
    if controller not in read_text(available).split():
        raise OSError(errno.ENOENT, f"no controller {controller!r} here, and no cgroup v1 hierarchy has it", available)
    write_line(os.path.join(parent, "cgroup.subtree_control"), f"+{controller}")
    return parent


def _fill(path: str, settings: Sequence[Setting], pid: int, refusals: Refusals) -> None:
    """Make a cgroup, write its limits, and only then let the process join: it is never in there without them."""
    pending = list(settings)
    try:
        _make(path)
        for setting in settings:
            try:
                _set(path, setting, refusals)
            except OSError as error:
                refusals.add(setting.field, _describe(error))
                pending.remove(setting)
        if pending:
            write_line(os.path.join(path, "cgroup.procs"), str(pid))
            return
    except OSError as error:
        for setting in pending:
            refusals.add(setting.field, _describe(error))
    with suppress(OSError):  # whether it is there or not, it limits nothing
        os.rmdir(path)


def _make(path: str) -> None:
    """Make a cgroup that holds no process and no setting of an earlier container of this id."""
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                error.strerror = "processes of another container with this id are in it"
            raise
        os.mkdir(path, 0o755)
    # Of cgroup v1 only: a cpuset begins empty, and nothing can join it until it has both (cgroup-v1/cpusets.rst).
    if os.path.exists(os.path.join(path, "cpuset.memory_migrate")):
        for file in ("cpuset.cpus", "cpuset.mems"):
            write_line(os.path.join(path, file), read_text(os.path.join(os.path.dirname(path), file)))


def _set(path: str, setting: Setting, refusals: Refusals) -> None:
    """Write one setting. Raises OSError, also where the kernel accepts it and does something else."""
    if setting.needs in refusals:
        raise OSError(
            errno.ECANCELED, f"means something else without {setting.needs}, which is not applied", setting.file
        )
    file = os.path.join(path, setting.file)
    write_line(file, setting.value)
    if setting.effective:
        effective = os.path.join(path, setting.effective)
        if read_text(effective) != read_text(file):
            raise OSError(
                errno.EINVAL, f"asked for {setting.value}, the kernel grants {read_text(effective)}", effective
            )


def _remove(path: str) -> None:
    deadline = time.monotonic() + _LEAVE_TIMEOUT_SECONDS
    while is_there(path):  # looked at first: a read-only cgroup file system refuses to remove what is not there
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def _describe(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}"
