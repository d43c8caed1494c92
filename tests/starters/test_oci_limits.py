"""Limits of OCI containers that the kernel does not take, or a runtime takes otherwise: refused or told."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from limpet import Engine, errors
from limpet.engine import Container
from limpet.engine.starters.oci import ranges, tools
from limpet.engine.starters.oci.abilities import find_unchangeable
from limpet.engine.starters.oci.cgroups import list_directories
from limpet.engine.starters.oci.ranges import require_limits, require_room
from limpet.engine.starters.oci.resources import find_unapplied_limits, make_limits
from limpet.engine.starters.oci.run_directory import RunDirectory
from limpet.schema.cri import HugepageLimit, LinuxContainerResources
from tests.starters.oci import RUNTIMES, config, processes_of

MOST = 2**63 - 1


def huge(*sizes: str) -> tuple[HugepageLimit, ...]:
    return tuple(HugepageLimit(page_size=size, limit=2 << 20) for size in sizes)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with processors 0 to 3 and 8, no NUMA, and huge pages of 64 KB, 2 MB and 1 GB."""
    (tmp_path / "cpus").write_text("0-3,8\n")
    for size in (64, 2048, 1 << 20):
        (tmp_path / "pages" / f"hugepages-{size}kB").mkdir(parents=True)
    files = {"cpuset_cpus": str(tmp_path / "cpus"), "cpuset_mems": str(tmp_path / "none")}
    monkeypatch.setattr(ranges, "_ONLINE", files)
    monkeypatch.setattr(ranges, "_PAGES", str(tmp_path / "pages"))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("oom_score_adj", (-1000, 0, 1000)),
        ("cpu_shares", (0, 2, 1 << 18)),
        ("cpu_period", (0, 1000, 1_000_000)),
        ("cpu_quota", (-1, 0, 1000, (1 << 44) - 1)),
        ("memory_limit_in_bytes", (-1, 0, 1, MOST)),
        ("memory_swap_limit_in_bytes", (-1, 0)),
        ("cpuset_cpus", ("", "0", "0-3", " 1 , 8", "0,,2", "0-3:1/2", "0-8:2/8")),
        ("cpuset_mems", ("", "0", "5")),
        ("hugepage_limits", (huge("64KB", "2MB", "1GB"),)),
        ("unified", ({"pids.max": "9", "hugetlb.2MB.max": "0", "cgroup.max.depth": "1"},)),
    ],
)
def test_what_the_kernel_takes(field: str, values: tuple[Any, ...]) -> None:
    """The ends of each range, and -1 where that means no limit."""
    for value in values:
        require_limits(LinuxContainerResources(**{field: value}))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("field", "values", "why"),
    [
        ("oom_score_adj", (-1001, 1001), "from -1000 to 1000 is needed$"),
        ("cpu_shares", (-1, -5, 1, (1 << 18) + 1, MOST), "from 2 to 262144 is needed$"),
        ("cpu_period", (-1, 1, 999, 1_000_001, MOST), "from 1000 to 1000000 is needed$"),
        ("cpu_quota", (-2, 1, 999, 1 << 44, MOST), "from 1000 to 17592186044415 is needed, or -1 for no limit"),
        ("memory_limit_in_bytes", (-2, -MOST), "is needed, or -1 for no limit"),
        ("memory_swap_limit_in_bytes", (-2,), "is needed, or -1 for no limit"),
        ("memory_swap_limit_in_bytes", (1, MOST), "memory_limit_in_bytes 0 must be given, and be no more"),
        ("cpuset_cpus", ("x", "1-0", "0 1", "-1", "0-", "all", ",", "99999999999", "0:1/0", "0\n"), "such as"),
        ("cpuset_cpus", ("4", "0,7", "0-8", "1,9", "3-9:1/2"), "this host has 0-3,8, and no [4-9]"),
        ("cpuset_mems", ("x",), "a list such as"),
        ("hugepage_limits", (huge(""), huge("../x"), huge("2MB", "64MB")), "huge pages of 1GB, 2MB, 64KB"),
        ("hugepage_limits", (huge("2MB", "1GB", "2MB"),), "it is there twice"),
        ("unified", ({"cgroup.procs": "1"}, {"x": "1"}, {"../cpu.max": "1"}), "is no limit of"),
        ("unified", ({"pids.max": ""}, {"pids.max": " \n"}, {"pids.max": "1\n2"}), "a value in one line is needed"),
    ],
)
def test_what_it_does_not_take_is_refused(field: str, values: tuple[Any, ...], why: str) -> None:
    """By the field's name, with what would do."""
    for value in values:
        with pytest.raises(errors.InvalidInputError, match=rf"^resources\.{field}.*{why}"):
            require_limits(LinuxContainerResources(**{field: value}))


def test_less_memory_than_a_runtime_needs_is_refused() -> None:
    """By what each needs; no limit, or none that is in force, is none."""
    for runtime, least in (("runc", 2 << 20), ("crun", 128 << 10)):
        for limit in (1, 4096, least - 1):
            with pytest.raises(
                errors.InvalidInputError, match=rf"^resources\.memory_limit_in_bytes {limit}: {runtime} "
            ):
                require_room({"memory": {"limit": limit}}, runtime)
        fine: list[dict[str, Any]] = [{"memory": {"limit": each}} for each in (-1, least, 1 << 40)]
        for limits in ({}, {"memory": {}}, *fine):
            require_room(limits, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_too_little_memory_is_known_at_create(shared: Engine, runtime: str) -> None:
    """A start with it would fail each time."""
    little = {"resources": {"memory_limit_in_bytes": 100 << 10}}
    with pytest.raises(errors.InvalidInputError, match=f"{runtime} itself needs more to start the container"):
        shared.create_container(config(f"little-{runtime}", "true", linux=little), runtime)


def test_a_kernel_without_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none of any size."""
    monkeypatch.setattr(ranges, "_PAGES", str(tmp_path / "none"))
    with pytest.raises(errors.InvalidInputError, match="this host has huge pages of no size"):
        require_limits(LinuxContainerResources(hugepage_limits=huge("2MB")))


def test_what_is_left_out_is_not_in_the_limits() -> None:
    """Nor is a quota that is none; all others are, each at its place."""
    asked = LinuxContainerResources(cpu_shares=512, cpu_period=50_000, cpu_quota=20_000, memory_limit_in_bytes=1 << 20)
    cpu = {"shares": 512, "period": 50_000, "quota": 20_000}
    assert make_limits(asked, ()) == {"cpu": cpu, "memory": {"limit": 1 << 20}}
    assert make_limits(asked, {"memory_limit_in_bytes": "why"}) == {"cpu": cpu}
    assert make_limits(LinuxContainerResources(cpu_quota=-1), ()) == {}
    assert make_limits(LinuxContainerResources(cpu_quota=-1), ("cpu_quota",)) == {}


def test_what_no_controller_limits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the controller's name, as on a kernel that was started without it."""
    monkeypatch.setattr("limpet.engine.starters.oci.resources.has_controller", lambda name: name != "memory")
    asked = LinuxContainerResources(cpu_shares=512, memory_limit_in_bytes=1 << 20, memory_swap_limit_in_bytes=1 << 21)
    found = find_unapplied_limits(asked, is_unified=True)
    assert set(found) == {"memory_limit_in_bytes", "memory_swap_limit_in_bytes"}
    assert "no cgroup controller 'memory'" in found["memory_limit_in_bytes"]


def test_a_file_of_a_missing_controller_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it no start would succeed; files that each cgroup has need none."""
    monkeypatch.setattr("limpet.engine.starters.oci.resources.has_controller", lambda name: name == "memory")
    asked = {"cgroup.max.depth": "1", "memory.high": "9999"}
    assert find_unapplied_limits(LinuxContainerResources(unified=asked), is_unified=True) == {}
    found = find_unapplied_limits(LinuxContainerResources(unified={**asked, "pids.max": "9"}), is_unified=True)
    assert found == {"unified": "this host has no cgroup controller 'pids', so none of it is done"}


def test_controllers_are_found() -> None:
    """Those of this host, of either version."""
    assert tools.has_controller("memory")
    assert not tools.has_controller("nosuch")


def read_limit(engine: Engine, container: Container, v1: str, v2: str) -> str:
    """Return what a file of the container's cgroup says."""
    processes = processes_of(engine.store.directory.path, container.id)
    paths = [
        Path(directory, name)
        for _, directory in list_directories(processes.cgroups, Path(processes.cgroup).name)
        for name in (v1, v2)
    ]
    return next(path for path in paths if path.exists()).read_text().strip()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_quota_is_lifted(shared: Engine, runtime: str) -> None:
    """-1 is no limit, at the start and while it runs, and stays so when another limit changes. crun cannot write it."""
    limits: dict[str, Any] = {"cpu_quota": -1, "cpu_shares": 512}
    free = shared.create_container(
        config(f"free-{runtime}", command=["/bin/sleep", "1000"], linux={"resources": limits}), runtime
    )
    bound = shared.create_container(
        config(f"bound-{runtime}", command=["/bin/sleep", "1000"], linux={"resources": {"cpu_quota": 20_000}}), runtime
    )
    for container in (free, bound):
        container.start()
    files = ("cpu.cfs_quota_us", "cpu.max")
    assert read_limit(shared, free, *files) in {"-1", "max 100000"}
    assert read_limit(shared, bound, *files) in {"20000", "20000 100000"}
    for changed in (LinuxContainerResources(cpu_quota=-1), LinuxContainerResources(cpu_shares=99)):
        found = bound.change_limits(changed).resources
        assert found is not None
        assert (found.requested.cpu_quota, dict(found.unapplied)) == (-1, {})
        assert read_limit(shared, bound, *files) in {"-1", "max 100000"}
    for container in (free, bound):
        container.stop(0)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_new_limits_that_are_none_change_nothing(shared: Engine, runtime: str) -> None:
    """They are refused before the runtime is asked, which might put one into force and fail at the next."""
    container = shared.create_container(config(f"firm-{runtime}", command=["/bin/sleep", "1000"]), runtime)
    container.start()
    for limits, why in (
        (LinuxContainerResources(cpu_shares=512, cpu_period=7), "cpu_period 7"),
        (LinuxContainerResources(cpu_shares=1), "cpu_shares 1"),
        (
            LinuxContainerResources(memory_limit_in_bytes=64 << 20, memory_swap_limit_in_bytes=1),
            "must be given, and be no more",
        ),
    ):
        with pytest.raises(errors.InvalidInputError, match=why):
            container.change_limits(limits)
    assert read_limit(shared, container, "cpu.shares", "cpu.weight") in {"1024", "100"}
    assert container.status.resources is None
    container.stop(0)


def test_what_has_not_changed_since_the_start_is_in_force(tmp_path: Path) -> None:
    """Of what changes at the start alone: huge pages for runc, the oom score for both."""
    run = RunDirectory(str(tmp_path))
    started = {"hugepageLimits": [{"pageSize": "2MB", "limit": 2 << 20}]}
    config = {"process": {"oomScoreAdj": 5}, "linux": {"resources": started}}
    for text in (json.dumps(config), "{}"):
        Path(run.join("config.json")).write_text(text)
        for size, score, is_runc in product(("2MB", "1GB", ""), (5, 6, 0), (True, False)):
            asked = LinuxContainerResources(hugepage_limits=huge(size) if size else (), oom_score_adj=score)
            old_size, old_score = ("2MB", 5) if text != "{}" else ("", 0)
            expected = {"hugepage_limits": size not in {old_size, ""}, "oom_score_adj": score not in {old_score, 0}}
            found = find_unchangeable(run, asked, is_runc=is_runc)
            assert set(found) == {name for name, is_told in expected.items() if is_told} - (
                set() if is_runc else {"hugepage_limits"}
            )


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_given_at_the_start_alone_is_told_when_it_changes(shared: Engine, runtime: str) -> None:
    """And not when another does: then it is in force. runc takes new limits of huge pages, and does nothing."""
    asked = config(f"old-{runtime}", command=["/bin/sleep", "1000"], linux={"resources": {"oom_score_adj": 321}})
    container = shared.create_container(asked, runtime)
    container.start()
    found = container.change_limits(LinuxContainerResources(cpu_shares=99)).resources
    assert found is not None
    assert (set(found.applied), dict(found.unapplied)) == ({"cpu_shares", "oom_score_adj"}, {})
    found = container.change_limits(LinuxContainerResources(oom_score_adj=322)).resources
    assert found is not None
    assert list(found.unapplied) == ["oom_score_adj"]
    if ranges._list_page_sizes():
        size = ranges._list_page_sizes()[0]
        found = container.change_limits(LinuxContainerResources(hugepage_limits=huge(size))).resources
        assert found is not None
        assert ("hugepage_limits" in found.unapplied) == (runtime == "runc" or not tools.has_controller("hugetlb"))
    container.stop(0)
