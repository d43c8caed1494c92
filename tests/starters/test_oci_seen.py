"""Each field of the CRI's LinuxContainerConfig, as the container's own program sees it: none is ignored in silence."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from msgspec import inspect

from limpet import Engine, errors
from limpet.schema.cri import LinuxContainerConfig
from tests.conftest import read_output
from tests.cri_page import put, walk
from tests.starters.oci import RUNTIMES, config

_SECURITY = "security_context"
_OPTIONS = f"{_SECURITY}.namespace_options"
_STATUS = "grep -E '^({})' /proc/self/status"
_V1 = os.path.isdir("/sys/fs/cgroup/memory")


class Seen(NamedTuple):
    """What a container with a field prints, and does not without."""

    value: Any
    script: str
    expected: str
    """A pattern for all of it."""
    beside: Mapping[str, Any] = {}
    """Other fields that it needs, which the one that it is compared with has, too."""

    def tells(self, found: str) -> bool:
        """Say whether a container that has the field would print this."""
        return re.fullmatch(self.expected, found, re.DOTALL) is not None


def _of_host(kind: str) -> str:
    """Return a pattern for what `ls -l` says of the host's namespace."""
    return f".* -> {re.escape(os.readlink(f'/proc/self/ns/{kind}'))}"


def limit(value: object, v1: str, v2: str, expected: str, second: str = "", **beside: Any) -> Seen:
    """One that a file of the container's cgroup tells, which differs between the two versions of cgroups."""
    script = f"cat /sys/fs/cgroup/{v1 if _V1 else v2}"
    return Seen(value, script, expected if _V1 else second or expected, beside)


FIELDS: Mapping[str, Seen] = {
    "resources.cpu_period": limit(50000, "cpu/cpu.cfs_period_us", "cpu.max", "50000", "max 50000"),
    "resources.cpu_quota": limit(20000, "cpu/cpu.cfs_quota_us", "cpu.max", "20000", "20000 100000"),
    "resources.cpu_shares": limit(512, "cpu/cpu.shares", "cpu.weight", "512", "20"),
    "resources.memory_limit_in_bytes": limit("67108864", "memory/memory.limit_in_bytes", "memory.max", "67108864"),
    "resources.memory_swap_limit_in_bytes": limit(
        "134217728",
        "memory/memory.memsw.limit_in_bytes",
        "memory.swap.max",
        "134217728",
        "67108864",
        **{"resources.memory_limit_in_bytes": "67108864"},
    ),
    "resources.oom_score_adj": Seen(321, "cat /proc/self/oom_score_adj", "321"),
    "resources.cpuset_cpus": limit("0", "cpuset/cpuset.cpus", "cpuset.cpus", "0"),
    "resources.cpuset_mems": limit("0", "cpuset/cpuset.mems", "cpuset.mems", "0"),
    "resources.hugepage_limits": limit(
        [{"page_size": "2MB", "limit": "4194304"}],
        "hugetlb/hugetlb.2MB.limit_in_bytes",
        "hugetlb.2MB.max",
        "4194304",
    ),
    "resources.unified": limit({"pids.max": "77"}, "pids/pids.max", "pids.max", "77"),
    f"{_SECURITY}.capabilities.add_capabilities": Seen(
        ["SYS_PTRACE"], _STATUS.format("CapBnd"), r"CapBnd:\t[0-9a-f]{11}[89a-f][0-9a-f]{4}"
    ),
    f"{_SECURITY}.capabilities.drop_capabilities": Seen(
        ["CAP_CHOWN"], _STATUS.format("CapBnd"), r"CapBnd:\t[0-9a-f]{15}[02468ace]"
    ),
    f"{_SECURITY}.capabilities.add_ambient_capabilities": Seen(
        ["NET_RAW"], _STATUS.format("CapAmb"), r"CapAmb:\t0000000000002000", {f"{_SECURITY}.run_as_user.value": "1000"}
    ),
    f"{_SECURITY}.privileged": Seen(True, "busybox mkdir /sys/x 2>&1", ".*not permitted"),
    f"{_OPTIONS}.network": Seen("NODE", "ls -l /proc/self/ns/net", _of_host("net")),
    f"{_OPTIONS}.pid": Seen("NODE", "ls -l /proc/self/ns/pid", _of_host("pid")),
    f"{_OPTIONS}.ipc": Seen("NODE", "ls -l /proc/self/ns/ipc", _of_host("ipc")),
    f"{_OPTIONS}.target_id": Seen("OTHER", "cat /proc/1/cmdline", "/bin/sleep.1000.", {f"{_OPTIONS}.pid": "TARGET"}),
    f"{_OPTIONS}.userns_options.mode": Seen("POD", "cat /proc/self/uid_map", "0 1000 1"),
    f"{_OPTIONS}.userns_options.uids": Seen(
        [{"host_id": 1000, "container_id": 0, "length": 1}], "cat /proc/self/uid_map", "0 1000 1"
    ),
    f"{_OPTIONS}.userns_options.gids": Seen(
        [{"host_id": 1000, "container_id": 0, "length": 1}], "cat /proc/self/gid_map", "0 1000 1"
    ),
    **{
        f"{_SECURITY}.selinux_options.{name}": Seen("x", "cat /proc/self/attr/current", "x")
        for name in ("user", "role", "type", "level")
    },
    f"{_SECURITY}.run_as_user.value": Seen("1000", "id -u", "1000"),
    f"{_SECURITY}.run_as_group.value": Seen("1003", "id -g", "1003", {f"{_SECURITY}.run_as_user.value": "1000"}),
    f"{_SECURITY}.run_as_username": Seen("web", "id -u", "1000"),
    f"{_SECURITY}.readonly_rootfs": Seen(True, "(echo > /tmp/file) 2>/dev/null || echo refused", "refused"),
    f"{_SECURITY}.supplemental_groups": Seen(["2000"], _STATUS.format("Groups"), "Groups:\t0 2000 "),
    f"{_SECURITY}.supplemental_groups_policy": Seen("Strict", "id -G", "1001", {f"{_SECURITY}.run_as_username": "web"}),
    f"{_SECURITY}.no_new_privs": Seen(True, _STATUS.format("NoNewPrivs"), "NoNewPrivs:\t1"),
    f"{_SECURITY}.masked_paths": Seen(["/etc/passwd"], "cat /etc/passwd | grep -c ''", "0"),
    f"{_SECURITY}.readonly_paths": Seen(["/tmp"], "(echo > /tmp/file) 2>/dev/null || echo refused", "refused"),
    f"{_SECURITY}.seccomp.profile_type": Seen("RuntimeDefault", _STATUS.format("Seccomp"), "Seccomp:\t2.*"),
    f"{_SECURITY}.seccomp.localhost_ref": Seen(
        "PROFILE", _STATUS.format("Seccomp"), "Seccomp:\t2.*", {f"{_SECURITY}.seccomp.profile_type": "Localhost"}
    ),
    f"{_SECURITY}.seccomp_profile_path": Seen("runtime/default", _STATUS.format("Seccomp"), "Seccomp:\t2.*"),
    f"{_SECURITY}.apparmor.profile_type": Seen("Localhost", "cat /proc/self/attr/current", "x"),
    f"{_SECURITY}.apparmor.localhost_ref": Seen("x", "cat /proc/self/attr/current", "x"),
    f"{_SECURITY}.apparmor_profile": Seen("localhost/x", "cat /proc/self/attr/current", "x"),
}


TOLD = (
    "resources.hugepage_limits",
    "resources.unified",
    f"{_OPTIONS}.userns_options.",
    f"{_SECURITY}.selinux_options.",
    f"{_SECURITY}.apparmor",
)
"""What is not done, or not on each host."""
ALIKE = frozenset({"resources.cpuset_mems"})
"""Whose value may be what a container has without."""


def test_all_fields_are_here() -> None:
    """Those that hold no others, as the CRI has them."""
    fields = {
        path for path, kind in walk(inspect.type_info(LinuxContainerConfig)) if not isinstance(kind, inspect.StructType)
    }
    assert set(FIELDS) == fields


@pytest.fixture(scope="module")
def neighbours(shared: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A container to look at in each sandbox, and the path of a seccomp profile."""
    for runtime in RUNTIMES:
        other = config(f"other-{runtime}", command=["/bin/sleep", "1000"])
        shared.create_container(other, runtime, id=f"other-{runtime}").start()
    profile = tmp_path_factory.mktemp("seccomp") / "profile.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW"}))
    return str(profile)


def look(engine: Engine, runtime: str, script: str, fields: Mapping[str, Any]) -> tuple[str, set[str]]:
    """Return what a container with these fields prints, or why it is refused, and the names of what it is told."""
    asked = config(f"c{os.urandom(4).hex()}", script)
    for path, value in fields.items():
        asked = put(asked, f"linux.{path}", value)
    try:
        container = engine.create_container(asked, runtime)
    except (errors.InvalidInputError, errors.UnsupportedError) as error:
        return f"refused: {error}", set()
    try:
        container.start()
        container.wait(20)
        return "\n".join(read_output(container, 0)), set(container.status.unapplied)
    except errors.StartError as error:
        return f"refused: {error}", set()
    finally:
        container.release()
        container.delete()


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("runtime", [pytest.param("runc"), pytest.param("crun", marks=pytest.mark.long)])
def test_a_field(shared: Engine, neighbours: str, runtime: str, path: str) -> None:
    """The program sees it, and something else without it; where this host cannot, it is told by name.

    Beside it runs another container of its sandbox, which decides nothing for it.
    """
    seen = FIELDS[path]
    value = {"PROFILE": neighbours, "OTHER": f"other-{runtime}"}.get(str(seen.value), seen.value)
    found, told = look(shared, runtime, seen.script, {**seen.beside, path: value})
    if told:
        assert path.startswith(TOLD)
        assert all(set(name.split(".")) <= set(path.split(".")) for name in told)
    else:
        assert seen.tells(found), found
        assert path in ALIKE or not seen.tells(look(shared, runtime, seen.script, seen.beside)[0])
