"""Limits: what is asked for is in force or has a reason why not; tables, and real processes in real cgroups."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limpet.engine import Engine
from limpet.engine.starters.process.cgroups.files import write_line
from limpet.engine.starters.process.cgroups.hierarchies import Cgroups, find_cgroups, read_cgroups
from limpet.engine.starters.process.cgroups.limits import (
    _open_v2_parent,
    _set,
    apply_limits,
    remove_limits,
    was_out_of_memory,
)
from limpet.engine.starters.process.cgroups.parents import Notes, find_parents
from limpet.engine.starters.process.cgroups.settings import Refusals, make_settings, requested_fields, shares_to_weight
from limpet.schema.cri import HugepageLimit, LinuxContainerResources
from limpet.schema.metadata import new_id
from limpet.schema.status import Resources
from tests.conftest import DEADLINE_SECONDS, EngineProcess, read_output, wait_until

MEBIBYTE = 1 << 20
ALL_V1 = ("cpu", "memory", "cpuset", "hugetlb", "pids")
NOBODY = 65534
EVERYTHING = LinuxContainerResources(
    cpu_period=50_000,
    cpu_quota=20_000,
    cpu_shares=512,
    memory_limit_in_bytes=64 * MEBIBYTE,
    memory_swap_limit_in_bytes=64 * MEBIBYTE,
    oom_score_adj=300,
    cpuset_cpus="0",
    cpuset_mems="0",
    hugepage_limits=(HugepageLimit(page_size="2MB", limit=4 * MEBIBYTE),),
    unified={"cgroup.max.depth": "3"},
)


def lines(requested: LinuxContainerResources, v1: tuple[str, ...]) -> list[tuple[str, str]]:
    settings, refusals = make_settings(requested, v1)
    assert not refusals
    return [(setting.file, setting.value) for setting in settings]


@pytest.mark.parametrize(
    ("asked", "v1", "v2"),
    [
        ({"cpu_shares": 2}, [("cpu.shares", "2")], [("cpu.weight", "1")]),
        ({"cpu_shares": 1024}, [("cpu.shares", "1024")], [("cpu.weight", "100")]),
        ({"cpu_period": 50_000}, [("cpu.cfs_period_us", "50000")], [("cpu.max", "max 50000")]),
        ({"cpu_quota": 20_000}, [("cpu.cfs_quota_us", "20000")], [("cpu.max", "20000 100000")]),
        ({"cpu_quota": -1}, [("cpu.cfs_quota_us", "-1")], [("cpu.max", "max 100000")]),
        (
            {"cpu_quota": 20_000, "cpu_period": 50_000},
            [("cpu.cfs_period_us", "50000"), ("cpu.cfs_quota_us", "20000")],
            [("cpu.max", "20000 50000"), ("cpu.max", "20000 50000")],
        ),
        ({"memory_limit_in_bytes": 4096}, [("memory.limit_in_bytes", "4096")], [("memory.max", "4096")]),
        ({"memory_limit_in_bytes": -1}, [("memory.limit_in_bytes", "-1")], [("memory.max", "max")]),
        (
            {"memory_limit_in_bytes": 4096, "memory_swap_limit_in_bytes": 12288},
            [("memory.limit_in_bytes", "4096"), ("memory.memsw.limit_in_bytes", "12288")],
            [("memory.max", "4096"), ("memory.swap.max", "8192")],
        ),
        ({"memory_swap_limit_in_bytes": -1}, [("memory.memsw.limit_in_bytes", "-1")], [("memory.swap.max", "max")]),
        ({"cpuset_cpus": "0-1"}, [("cpuset.cpus", "0-1")], [("cpuset.cpus", "0-1")]),
        ({"cpuset_mems": "0"}, [("cpuset.mems", "0")], [("cpuset.mems", "0")]),
        (
            {"hugepage_limits": (HugepageLimit(page_size="1GB", limit=0),)},
            [("hugetlb.1GB.rsvd.limit_in_bytes", "0"), ("hugetlb.1GB.limit_in_bytes", "0")],
            [("hugetlb.1GB.rsvd.max", "0"), ("hugetlb.1GB.max", "0")],
        ),
        ({"oom_score_adj": 5}, [], []),
        ({}, [], []),
    ],
)
def test_each_limit_in_both_versions(
    asked: dict[str, object], v1: list[tuple[str, str]], v2: list[tuple[str, str]]
) -> None:
    """Each field becomes the line that the kernel reads in cgroup v1, and in v2."""
    requested = LinuxContainerResources(**asked)  # type: ignore[arg-type]
    assert lines(requested, ALL_V1) == v1
    assert lines(requested, ()) == v2


def test_weight_of_shares() -> None:
    """All shares there are become weights in order, in range, with ends and default on each other."""
    weights = [shares_to_weight(shares) for shares in range(2, 262145)]
    assert weights == sorted(weights)
    assert (weights[0], weights[1024 - 2], weights[-1]) == (1, 100, 10_000)
    assert shares_to_weight(2000) == 170  # as runc 1.4 writes it


@pytest.mark.parametrize(
    ("asked", "field", "reason"),
    [
        ({"cpu_shares": 1}, "cpu_shares", "1 are not from 2 to 262144"),
        ({"cpu_shares": 262145}, "cpu_shares", "262145 are not from"),
        ({"cpuset_cpus": "0\n1"}, "cpuset_cpus", r"'0\\n1' has characters"),
        ({"cpuset_mems": "0\x00"}, "cpuset_mems", "has characters"),
        ({"memory_swap_limit_in_bytes": 1}, "memory_swap_limit_in_bytes", "set a limit of memory"),
        (
            {"memory_swap_limit_in_bytes": 1, "memory_limit_in_bytes": 2},
            "memory_swap_limit_in_bytes",
            "less than memory alone, 2",
        ),
        ({"hugepage_limits": (HugepageLimit(page_size="../2MB"),)}, "hugepage_limits", "'../2MB' is no page size"),
        ({"hugepage_limits": (HugepageLimit(page_size=""),)}, "hugepage_limits", "'' is no page size"),
        ({"unified": {"../memory.max": "1"}}, "unified", "'../memory.max': this is no name"),
        ({"unified": {"memory..max": "1"}}, "unified", "is no name"),
        ({"unified": {"memory.max\n": "1"}}, "unified", "is no name"),
        ({"unified": {"limpet-b/memory.max": "1"}}, "unified", "is no name"),
        ({"unified": {"memory": "1"}}, "unified", "is no name"),
        ({"unified": {"cgroup.procs": "1"}}, "unified", "moves, freezes or kills"),
        ({"unified": {"cgroup.freeze": "1"}}, "unified", "moves, freezes or kills"),
        ({"unified": {"memory.high": "1\x00"}}, "unified", "has characters"),
        ({"unified": {"memory.max": "1"}, "memory_limit_in_bytes": 2}, "unified", "another field"),
    ],
)
def test_what_cannot_be_written_down(asked: dict[str, object], field: str, reason: str) -> None:
    """What has no line in cgroup v2, or would name another file, is refused with the value; the rest is planned."""
    settings, refusals = make_settings(LinuxContainerResources(**asked), ())  # type: ignore[arg-type]
    assert list(refusals) == [field]
    assert re.search(reason, refusals[field])
    assert {setting.field for setting in settings} == set(asked) - {field}


def test_unified_is_for_v2_alone() -> None:
    """A file of cgroup v2 is written line by line where its controller is on v2, and refused where that is on v1."""
    requested = LinuxContainerResources(unified={"io.max": "8:0 rbps=1\n8:16 rbps=2\n", "cgroup.max.depth": "3"})
    assert lines(requested, ALL_V1) == [
        ("io.max", "8:0 rbps=1"),
        ("io.max", "8:16 rbps=2"),
        ("cgroup.max.depth", "3"),
    ]
    settings, refusals = make_settings(requested, ("io",))
    assert [setting.file for setting in settings] == ["cgroup.max.depth"]
    assert refusals == {"unified": "'io.max': this is for cgroup v2, and controller 'io' is on cgroup v1 here"}


numbers = st.sampled_from([0, -1, -5, 1, 2, 1024, 2**62])
texts = st.text(max_size=8) | st.sampled_from(["", "0", "memory.max", "cgroup.procs", "2MB", "a/b", "..", "a\nb"])


@given(
    st.builds(
        LinuxContainerResources,
        cpu_period=numbers,
        cpu_quota=numbers,
        cpu_shares=numbers,
        memory_limit_in_bytes=numbers,
        memory_swap_limit_in_bytes=numbers,
        cpuset_cpus=texts,
        cpuset_mems=texts,
        hugepage_limits=st.lists(st.builds(HugepageLimit, page_size=texts, limit=st.just(1)), max_size=2).map(tuple),
        unified=st.dictionaries(texts, texts, max_size=3),
    ),
    st.sets(st.sampled_from(ALL_V1)),
)
def test_whatever_is_asked_is_planned_or_refused(requested: LinuxContainerResources, v1: set[str]) -> None:
    """No request is forgotten, and none becomes a path out of the cgroup or more than one line."""
    settings, refusals = make_settings(requested, v1)
    assert {setting.field for setting in settings} | set(refusals) == set(requested_fields(requested))
    for setting in settings:
        assert re.fullmatch(r"[a-z]+(\.[A-Za-z0-9_-]+)+", setting.file)
        assert not setting.file.startswith("cgroup.") or setting.file.startswith("cgroup.max.")
        assert setting.value.isprintable()


HYBRID_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/c1 /sys/fs/cgroup/memory ro,relatime - cgroup memory rw,memory
37 31 0:34 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
38 31 0:35 / /mnt/with\\040space rw,relatime - cgroup2 cgroup2 rw
"""


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "v1", "v2"),
    [
        (
            "4:memory:/docker/c1/x\n2:cpu,cpuacct:/a\n1:name=systemd:/a\n0::/b:c\n",
            HYBRID_MOUNTS,
            {
                "memory": "/sys/fs/cgroup/memory/x",
                "cpu": "/sys/fs/cgroup/cpu,cpuacct/a",
                "cpuacct": "/sys/fs/cgroup/cpu,cpuacct/a",
            },
            "/mnt/with space/b:c",
        ),
        ("4:memory:/docker/c1/a\x0c\r\u2028b\n", HYBRID_MOUNTS, {"memory": "/sys/fs/cgroup/memory/a\x0c\r\u2028b"}, ""),
        ("4:memory:/docker/c1\n0::/\n", HYBRID_MOUNTS, {"memory": "/sys/fs/cgroup/memory"}, "/mnt/with space"),
        ("4:memory:/docker/c12\n0::/../other\n", HYBRID_MOUNTS, {}, ""),
        ("4:memory:/\n0::/\n", "22 27 0:21 / /proc rw,relatime - proc proc rw\n", {}, ""),
        ("", "", {}, ""),
    ],
)
def test_own_cgroups_are_found(cgroup: str, mountinfo: str, v1: dict[str, str], v2: str) -> None:
    """Co-mounted controllers, partial mounts, named hierarchies and cgroup namespaces are read as they are."""
    own = find_cgroups(cgroup, mountinfo)
    assert (own.v1, own.v2) == (v1, v2)


def test_a_cgroup_is_noted_whatever_its_name(tmp_path: Path) -> None:
    """A newline alone, which no cgroup's name has, ends a line."""
    parents = ["/sys/fs/cgroup/a\rb", "/sys/fs/cgroup/a\x0cb", "/sys/fs/cgroup/a\u2028b", "/sys/fs/cgroup/\udcff"]
    for parent in parents:
        Notes(str(tmp_path)).note(parent)
    assert list(Notes(str(tmp_path)).noted) == parents


@pytest.mark.parametrize(
    ("inside", "marks", "parent"),
    [
        ("unit/engine", {"user.delegate": b"1"}, "unit"),
        ("unit/engine", {"user.delegate": b"0"}, None),
        ("unit/engine", {"user.delegate": b""}, None),
        ("unit/engine", {}, None),
        ("unit/engine/deeper", {"user.delegate": b"1"}, None),
        ("", {"user.delegate": b"1"}, None),
    ],
)
def test_only_a_cgroup_that_was_given_away_takes_others(
    tmp_path: Path, inside: str, marks: dict[str, bytes], parent: str | None
) -> None:
    """Beside a process that is in a cgroup v2 one can be made below the parent that systemd's mark names, else none.

    The mark counts on the parent alone, and what is above the mount point is not ours to see.
    """
    top = tmp_path / "top"
    (top / "unit" / "engine" / "deeper").mkdir(parents=True)
    own = top / inside
    (own / "cgroup.type").touch()
    for name, value in marks.items():
        try:
            os.setxattr(top / "unit" if inside else tmp_path, name, value)
        except OSError:
            pytest.skip("this file system keeps no marks")
    cgroups = Cgroups({}, str(own), str(top))
    if parent is not None:
        assert cgroups.find_v2_parent() == str(top / parent)
        return
    with pytest.raises(OSError, match="this process is in it") as refused:
        cgroups.find_v2_parent()
    assert refused.value.filename == str(own)


@pytest.mark.parametrize(
    ("inside", "mark", "is_taken"),
    [
        ("user@7.service/app.slice/job.service/engine", "user@7.service", True),
        ("user@7.service/app.slice/job.scope/engine", "user@7.service", True),
        ("user@7.service/app.slice/job.service/engine", "", False),
        ("user@7.service/app.slice/job.service/engine/deeper", "user@7.service", False),
        ("user@7.service/app.slice/job.service", "user@7.service", False),
        ("user@7.service/app.slice/job.slice", "user@7.service", False),
        ("job.service/inner.scope", ".", False),
        ("job.service/engine", ".", False),
    ],
)
def test_a_unit_of_a_users_systemd_takes_others(tmp_path: Path, inside: str, mark: str, is_taken: bool) -> None:
    """It has no mark of its own, for that systemd sets none; what the machine's gave to the user has."""
    own = tmp_path / "top" / inside
    own.mkdir(parents=True)
    (own / "cgroup.type").touch()
    if mark:
        try:
            os.setxattr(tmp_path / "top" / mark, "user.delegate", b"1")
        except OSError:
            pytest.skip("this file system keeps no marks")
    cgroups = Cgroups({}, str(own), str(tmp_path / "top"))
    if is_taken:
        assert cgroups.find_v2_parent() == str(own.parent)
        return
    with pytest.raises(OSError, match="this process is in it"):
        cgroups.find_v2_parent()


class Held:
    """Children that wait at a pipe, and the container id they are limited under."""

    def __init__(self) -> None:
        self.id = f"test-{new_id()}"
        self._children: list[subprocess.Popen[str]] = []

    def start(self, script: str = "") -> subprocess.Popen[str]:
        """Start a child that runs `script` once it reads a line."""
        child = subprocess.Popen(
            [sys.executable, "-c", f"import sys, time; print(flush=True); sys.stdin.readline()\n{script}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "\n"
        return child

    def limit(self, child: subprocess.Popen[str], requested: LinuxContainerResources) -> Resources:
        """Limit a child; whatever the machine allows, applied and unapplied share out what was asked for."""
        return check(apply_limits(self.id, child.pid, requested), requested)

    def end(self) -> None:
        """Kill the children."""
        for child in self._children:
            child.kill()
            child.communicate()


def check(resources: Resources, requested: LinuxContainerResources) -> Resources:
    assert resources.requested == requested
    assert sorted([*resources.applied, *resources.unapplied]) == sorted(requested_fields(requested))
    assert all(resources.unapplied.values())
    return resources


@pytest.fixture
def held() -> Iterator[Held]:
    children = Held()
    yield children
    children.end()
    assert remove_limits(children.id) == ()
    assert find_directories(children.id) == []


def find_directories(container_id: str) -> list[str]:
    """Return the container's cgroups, looked for everywhere."""
    found = []
    for top, names, _ in os.walk("/sys/fs/cgroup"):
        found += [os.path.join(top, name) for name in names if container_id in name]
    return found


def may_limit(controller: str) -> bool:
    """Say whether this machine lets us make a cgroup for a controller of v1: then nothing excuses not limiting."""
    parent = read_cgroups(0).v1.get(controller)
    if not parent:
        return False
    try:
        os.mkdir(f"{parent}/limpet-may-{os.getpid()}")
        os.rmdir(f"{parent}/limpet-may-{os.getpid()}")
    except OSError:
        return False
    return True


def test_every_limit_on_this_machine(held: Held) -> None:
    """What may be limited here is, as the kernel shows it; the rest has a reason; removed, nothing is left."""
    child = held.start()
    resources = held.limit(child, EVERYTHING)
    for controller, fields in {
        "cpu": {"cpu_period", "cpu_quota", "cpu_shares"},
        "memory": {"memory_limit_in_bytes"},
        "cpuset": {"cpuset_cpus", "cpuset_mems"},
    }.items():
        assert not may_limit(controller) or fields <= set(resources.applied), resources.unapplied
    assert "oom_score_adj" in resources.applied
    assert Path(f"/proc/{child.pid}/oom_score_adj").read_text() == "300\n"
    if "cpuset_cpus" in resources.applied:
        assert os.sched_getaffinity(child.pid) == {0}
    cgroups = Path(f"/proc/{child.pid}/cgroup").read_text()
    assert (f"/limpet-{held.id}\n" in cgroups) is (resources.applied != ("oom_score_adj",))
    if may_limit("cpu"):
        directory = Path(read_cgroups(0).v1["cpu"], f"limpet-{held.id}")
        files = ("cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.shares")
        assert [(directory / file).read_text() for file in files] == ["50000\n", "20000\n", "512\n"]


def test_memory_is_limited(held: Held) -> None:
    """A process that takes more memory than its limit is killed, where the limit is said to be applied."""
    child = held.start("block = bytearray(256 << 20)")
    both = LinuxContainerResources(memory_limit_in_bytes=32 * MEBIBYTE, memory_swap_limit_in_bytes=32 * MEBIBYTE)
    resources = held.limit(child, both)
    child.communicate("\n", DEADLINE_SECONDS)
    if len(resources.applied) == 2:
        assert child.returncode == -signal.SIGKILL
        assert was_out_of_memory(held.id)
    elif not resources.applied:
        assert child.returncode == 0


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("memory.events", "max 3\noom 1\noom_kill 2\n", True),
        ("memory.events", "max 3\noom 1\noom_kill 0\n", False),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", True),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 1\n", False),
    ],
)
def test_a_kill_for_want_of_memory_is_told(tmp_path: Path, file: str, text: str, expected: bool) -> None:
    """By the counter of kills alone, wherever the container's cgroup was noted, in both versions of cgroups."""
    (tmp_path / "limpet-one").mkdir()
    (tmp_path / "limpet-one" / file).write_text(text)
    assert was_out_of_memory("one", 0, ["/no/such/cgroup", str(tmp_path)]) is expected


def test_a_controller_of_v2_is_given_to_the_children(tmp_path: Path) -> None:
    """Once: one that they have, or that all have, is not asked for; one that is not here is told by its name."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    given = tmp_path / "cgroup.subtree_control"
    given.write_text("memory\n")
    own = Cgroups({}, str(tmp_path), str(tmp_path))
    for controller in ("", "memory"):
        assert _open_v2_parent(own, controller) == str(tmp_path)
        assert given.read_text() == "memory\n"
    assert _open_v2_parent(own, "pids") == str(tmp_path)
    assert given.read_text().startswith("+pids\n")
    with pytest.raises(OSError, match="no controller 'rdma' here"):
        _open_v2_parent(own, "rdma")


def test_where_a_keeper_is_gone_its_cgroups_are_those_noted_or_our_own() -> None:
    """What was noted is enough; without a note it is looked for below our own."""
    with subprocess.Popen(["true"]) as gone:
        pass
    assert find_parents(gone.pid, ["/noted"]) == ("/noted",)
    assert find_parents(gone.pid, []) == find_parents(0, []) == read_cgroups(0).find_parents()
    assert find_parents(os.getpid(), ["/noted"]) == ("/noted", *read_cgroups(0).find_parents())


def test_cpu_time_is_limited(held: Held) -> None:
    """A process that spins for a second with a fifth of a CPU gets no more, where the quota is said to be applied."""
    child = held.start("end = time.monotonic() + 1\nwhile time.monotonic() < end: pass\nprint(time.process_time())")
    resources = held.limit(child, LinuxContainerResources(cpu_quota=20_000))
    output, _ = child.communicate("\n", DEADLINE_SECONDS)
    if resources.applied:
        assert float(output) < 0.6


def test_what_the_kernel_refuses_is_unapplied(held: Held) -> None:
    """A value that the kernel does not take comes back with its file and the kernel's words; its neighbours are set."""
    child = held.start()
    assert held.limit(child, LinuxContainerResources(cpuset_cpus="4095")).applied == ()
    assert find_directories(held.id) == []
    requested = LinuxContainerResources(
        cpu_period=5_000_000, cpu_quota=100_000, cpu_shares=512, cpuset_cpus="4095", cpuset_mems="0", oom_score_adj=1001
    )
    resources = held.limit(child, requested)
    assert re.search(rf"/proc/{child.pid}/oom_score_adj: Invalid argument", resources.unapplied["oom_score_adj"])
    if may_limit("cpu") and may_limit("cpuset"):
        assert resources.applied == ("cpu_shares", "cpuset_mems")
        assert resources.unapplied["cpu_period"].endswith("cpu.cfs_period_us: Invalid argument")
        assert "without cpu_period" in resources.unapplied["cpu_quota"]
        assert "cpuset.cpus: " in resources.unapplied["cpuset_cpus"]


def test_what_v2_accepts_and_does_not_follow_is_refused(tmp_path: Path) -> None:
    """A CPU that cgroup v2 takes note of and does not grant is no limit that is applied."""
    (setting,), _ = make_settings(LinuxContainerResources(cpuset_cpus="7"), ())
    (tmp_path / "cpuset.cpus").touch()
    (tmp_path / "cpuset.cpus.effective").write_text("0-1\n")
    with pytest.raises(OSError, match="asked for 7, the kernel grants 0-1"):
        _set(str(tmp_path), setting, Refusals())
    (tmp_path / "cpuset.cpus.effective").write_text("7\n")
    _set(str(tmp_path), setting, Refusals())


def test_a_write_names_its_file_and_keeps_no_descriptor(tmp_path: Path) -> None:
    """It is one line, and closed, whether the kernel takes it or not: limits are set for each of many containers."""
    file = tmp_path / "pids.max"
    file.touch()
    before = os.listdir("/proc/self/fd")
    write_line(str(file), "12")
    assert file.read_text() == "12\n"
    with pytest.raises(OSError, match="/dev/full"):
        write_line("/dev/full", "12")
    assert os.listdir("/proc/self/fd") == before


def test_nothing_asked_makes_no_cgroup(held: Held) -> None:
    """Without a limit, or with none that is a cgroup's, no cgroup is made; removing is fine all the same."""
    child = held.start()
    assert held.limit(child, LinuxContainerResources()).applied == ()
    assert held.limit(child, LinuxContainerResources(oom_score_adj=1)).applied == ("oom_score_adj",)
    assert find_directories(held.id) == []
    assert remove_limits(held.id) == ()


def test_a_cgroup_in_use_is_left_alone(held: Held) -> None:
    """A second container with a live one's id is not limited through its cgroup, and says so; removing says it, too."""
    if not may_limit("cpu"):
        pytest.skip("needs a cgroup v1 hierarchy that may be written to")
    first, second = held.start(), held.start()
    assert held.limit(first, LinuxContainerResources(cpu_shares=512)).applied == ("cpu_shares",)
    told = held.limit(second, LinuxContainerResources(cpu_shares=1024)).unapplied
    assert told["cpu_shares"].endswith("processes of another container with this id are in it")
    (left,) = remove_limits(held.id)
    assert left.endswith(f"/limpet-{held.id}: Device or resource busy")
    assert Path(read_cgroups(0).v1["cpu"], f"limpet-{held.id}", "cpu.shares").read_text() == "512\n"
    first.kill()
    first.wait()
    assert remove_limits(held.id) == ()


def test_a_left_over_cgroup_limits_nobody(held: Held) -> None:
    """What a killed engine left of an id does not hold for the next container with it."""
    if not may_limit("cpu"):
        pytest.skip("needs a cgroup v1 hierarchy that may be written to")
    earlier = held.start()
    held.limit(earlier, LinuxContainerResources(cpu_quota=20_000))
    earlier.kill()
    earlier.wait()
    assert held.limit(held.start(), LinuxContainerResources(cpu_shares=512)).applied == ("cpu_shares",)
    assert Path(read_cgroups(0).v1["cpu"], f"limpet-{held.id}", "cpu.cfs_quota_us").read_text() == "-1\n"


def test_a_process_that_is_gone_is_not_limited(held: Held) -> None:
    """Nothing is said to be applied to a process that has ended, and no cgroup is left of the attempt."""
    child = held.start()
    child.kill()
    child.wait()
    assert held.limit(child, EVERYTHING).applied == ()
    assert find_directories(held.id) == []


def may_become_nobody() -> bool:
    """Say whether we are root, of a user namespace that has a user nobody in it."""
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return os.geteuid() == 0 and any(int(start) <= NOBODY < int(start) + int(count) for start, _, count in ranges)


def call_as(uid: int, cgroup: str, function: Callable[[], object]) -> object:
    """Return what `function` returns in a fork that has joined a cgroup and become a user; "" and -1: as we are."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            if cgroup:
                Path(cgroup, "cgroup.procs").write_text("0")
            if uid != -1:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            os.write(write, json.dumps(function()).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    assert answer, "the fork failed"
    return json.loads(answer)


def limit_a_child(container_id: str, requested: LinuxContainerResources) -> dict[str, object]:
    with subprocess.Popen(["cat"], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()  # it has been executed, and its files in /proc are its user's
            resources = check(apply_limits(container_id, child.pid, requested), requested)
            cgroups = Path(f"/proc/{child.pid}/cgroup").read_text()
        finally:
            child.kill()
            child.wait()
    left = remove_limits(container_id)
    return {"applied": resources.applied, "unapplied": resources.unapplied, "cgroups": cgroups, "left": left}


def test_an_ordinary_user_is_told_what_is_absent(held: Held) -> None:
    """Without the right to make cgroups nothing is applied but what needs none, and each field says why."""
    uid = NOBODY if may_become_nobody() else -1
    if uid == -1 and os.geteuid() == 0:
        pytest.skip("needs a user without rights")
    told = call_as(uid, "", lambda: limit_a_child(held.id, EVERYTHING))
    assert isinstance(told, dict)
    if uid == NOBODY:
        assert told["applied"] == ["oom_score_adj"]
        for field, reason in told["unapplied"].items():
            assert re.match(r"/\S+: \w", reason), (field, reason)
    lowered = call_as(uid, "", lambda: limit_a_child(held.id, LinuxContainerResources(oom_score_adj=-999)))
    assert isinstance(lowered, dict)
    assert "oom_score_adj: Permission denied" in lowered["unapplied"]["oom_score_adj"]


@pytest.fixture
def unit_cgroup() -> Iterator[Path]:
    """A cgroup v2 like that of a systemd unit, with an engine's subgroup, and with the hugetlb controller."""
    own = read_cgroups(0)
    if not own.v2 or not may_become_nobody():
        pytest.skip("needs cgroup v2, and to be root")
    control = Path(own.v2_mount_point, "cgroup.subtree_control")
    unit = Path(own.v2_mount_point, f"test-{new_id()}")
    try:
        control.write_text("+hugetlb")
        (unit / "engine").mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"needs to write to a cgroup v2 with the hugetlb controller: {error}")
    yield unit
    (unit / "engine").rmdir()
    unit.rmdir()


def test_v2_is_used_where_it_is_delegated(held: Held, unit_cgroup: Path) -> None:
    """In cgroup v2 an engine limits from a subgroup of a delegated cgroup, as an ordinary user, and only there."""
    requested = LinuxContainerResources(
        hugepage_limits=(HugepageLimit(page_size="2MB", limit=4 * MEBIBYTE),),
        unified={"cgroup.max.depth": "1", "misc.max": "x 1"},
    )

    def attempt(cgroup: Path) -> dict[str, object]:
        told = call_as(NOBODY, str(cgroup), lambda: limit_a_child(held.id, requested))
        assert isinstance(told, dict)
        return told

    for cgroup in (unit_cgroup, unit_cgroup / "engine"):
        told = attempt(cgroup)
        assert told["applied"] == []
        assert f"{cgroup}: this process is in it" in told["unapplied"]["hugepage_limits"]  # type: ignore[index]
    for path in (unit_cgroup, unit_cgroup / "cgroup.procs", unit_cgroup / "cgroup.subtree_control"):
        os.chown(path, NOBODY, NOBODY)
    os.setxattr(unit_cgroup, "user.delegate", b"1")
    told = attempt(unit_cgroup / "engine")
    assert told["applied"] == ["hugepage_limits"]
    assert f"/{unit_cgroup.name}/limpet-{held.id}\n" in told["cgroups"]  # type: ignore[operator]
    assert "no controller 'misc' here" in told["unapplied"]["unified"]  # type: ignore[index]
    assert told["left"] == []


def test_v2_is_used_in_a_unit_of_a_users_systemd(held: Held, unit_cgroup: Path) -> None:
    """Its cgroup is below one that is delegated to the user, bears no mark itself, and belongs to whom it is for."""
    requested = LinuxContainerResources(hugepage_limits=(HugepageLimit(page_size="2MB", limit=4 * MEBIBYTE),))
    job = unit_cgroup / "job.service"
    (job / "engine").mkdir(parents=True)
    try:
        (unit_cgroup / "cgroup.subtree_control").write_text("+hugetlb")
        os.setxattr(unit_cgroup, "user.delegate", b"1")
        for owner, applied in ((NOBODY, ["hugepage_limits"]), (0, [])):
            for path in (unit_cgroup, unit_cgroup / "cgroup.procs", job, job / "cgroup.procs"):
                os.chown(path, owner, owner)
            os.chown(job / "cgroup.subtree_control", owner, owner)
            told = call_as(NOBODY, str(job / "engine"), lambda: limit_a_child(held.id, requested))
            assert isinstance(told, dict)
            assert (told["applied"], told["left"]) == (applied, [])
    finally:
        (job / "engine").rmdir()
        job.rmdir()


def test_a_container_says_what_limits_it(engine: Engine) -> None:
    """A container's status tells its limits from start to release, and release leaves no cgroup behind."""
    sandbox = engine.create_sandbox({"metadata": {"name": "pod"}})
    container = engine.create_container(
        {
            "metadata": {"name": "limited"},
            "image": {"image": "host"},
            "command": ["cat", "/proc/self/oom_score_adj"],
            "log_path": "limited.log",
            "linux": {"resources": {"memory_limit_in_bytes": 64 * MEBIBYTE, "oom_score_adj": 7}},
        },
        sandbox.id,
    )
    container.start()
    resources = container.wait(DEADLINE_SECONDS).resources
    assert resources is not None
    assert "oom_score_adj" in check(resources, resources.requested).applied
    assert not may_limit("memory") or "memory_limit_in_bytes" in resources.applied, resources.unapplied
    assert read_output(container, 1) == ["7"]
    container.release()
    assert find_directories(container.id) == []


@pytest.fixture
def elsewhere() -> Iterator[list[Path]]:
    """A cgroup in each hierarchy, below ours, for an engine that is to be in others than we."""
    if not may_limit("memory"):
        pytest.skip("needs to make cgroups v1")
    own = read_cgroups(0)
    made = [Path(parent, f"test-{new_id()}") for parent in dict.fromkeys([*own.v1.values(), own.v2]) if parent]
    for path in made:
        path.mkdir()
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (path / file).exists():
                (path / file).write_text((path.parent / file).read_text())
    yield made
    for path in made:
        wait_until(lambda path=path: not (path / "cgroup.procs").read_text(), "the end of all that is in there")  # type: ignore[misc] # bound at once
        path.rmdir()


def test_cgroups_are_found_after_their_keeper_is_lost(
    engine_process: Callable[[str], EngineProcess],
    state_dir: str,
    elsewhere: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An engine in other cgroups lets go on what is frozen, and leaves no cgroup of it."""
    key = f"frozen-{new_id()}"
    script = f"""
for path in {list(map(str, elsewhere))}:
    with open(f"{{path}}/cgroup.procs", "w") as file:
        file.write("0")
engine = Engine.open(state_dir)
sandbox = engine.create_sandbox({{"metadata": {{"name": "pod"}}}})
container = engine.create_container({{
    "metadata": {{"name": "frozen"}},
    "image": {{"image": "host"}},
    "command": ["sleep", "1000"],
    "linux": {{"resources": {{"memory_limit_in_bytes": {64 * MEBIBYTE}}}}},
}}, sandbox.id, id={key!r})
container.start()
container.pause()
say(*container.status.resources.applied)
time.sleep(60)
"""
    process = engine_process(script)
    assert process.read() == ["memory_limit_in_bytes"]
    process.kill()
    for pid in find_keepers(state_dir):
        os.kill(pid, signal.SIGKILL)
    with Engine.open(state_dir) as engine:
        container = engine.get(key)
        assert container.status.paused
        container.resume()
        assert container.stop(DEADLINE_SECONDS).exit_code == 128 + signal.SIGTERM
        for pid in find_keepers(state_dir):
            os.kill(pid, signal.SIGKILL)
        assert len(find_directories(key)) == 2  # of the limit, and of the pause
        container.release()
    assert find_directories(key) == []
    assert "cgroup" not in caplog.text


SLOW_GATES = """
import sys, time
sys.path.insert(0, sys.argv[1])
from keeper import gate, main

take_descriptors = gate._take_descriptors

def take_late(*given):
    time.sleep(0.3)
    take_descriptors(*given)

gate._take_descriptors = take_late
main.main()
"""


def test_a_score_is_kept_by_what_gets_no_processor_for_a_while(
    engine: Engine, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine has given a process that was just forked its program has; one that is given none has 0."""
    monkeypatch.setattr("limpet.engine.starters.process.client._PROGRAM", SLOW_GATES)
    sandbox = engine.create_sandbox({"metadata": {"name": "pod"}})
    for name, asked, expected in (("given", {"oom_score_adj": 7}, "7"), ("plain", {}, "0")):
        config = {
            "metadata": {"name": name},
            "image": {"image": "host"},
            "command": ["cat", "/proc/self/oom_score_adj"],
            "log_path": f"{name}.log",
            "linux": {"resources": asked},
        }
        container = engine.create_container(config, sandbox.id)
        container.start()
        resources = container.wait(DEADLINE_SECONDS).resources
        assert asked.keys() == set(resources.applied if resources is not None else ())
        assert read_output(container, 1) == [expected]


def find_keepers(state_dir: str) -> list[int]:
    """Return the pids of the keeper's processes."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.readlink(f"/proc/{name}/fd/3") == f"{os.path.realpath(state_dir)}/keeper":
                found.append(int(name))
    return found
