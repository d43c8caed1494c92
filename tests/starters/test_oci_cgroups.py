"""What the cgroups of a container say and are told, in both versions: directories stand for them."""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from limpet.engine.starters.oci import cgroups
from limpet.recovery.mounts import Mount
from limpet.schema.cri import LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxMetadata
from limpet.schema.errors import InvalidInputError

NAME = "key-one"
V1 = [f"{number}:{each}:/limpet/{NAME}" for number, each in enumerate(("freezer", "memory", "pids", "cpu,cpuacct"), 2)]
V2 = [f"0::/limpet/{NAME}"]
OTHER = ["9:name=systemd:/", "1:cpuset:/limpet", "0::/user.slice"]
V1_USE = {
    "memory/memory.usage_in_bytes": "5000\n",
    "memory/memory.stat": "cache 1\ninactive_file 7\ntotal_inactive_file 1000\n",
    "pids/pids.current": "3\n",
    "cpu,cpuacct/cpuacct.usage": "123456789\n",
}
V2_USE = {
    "memory.current": "7000\n",
    "memory.stat": "anon 12\ninactive_file 3000\n",
    "pids.current": "2\n",
    "cpu.stat": "usage_usec 42\nuser_usec 40\n",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroups, "_ROOT", str(tmp_path))
    return tmp_path


def fill(directory: Path, files: Mapping[str, str]) -> None:
    for path, text in files.items():
        controller, _, name = path.rpartition("/")
        where = directory / controller / "limpet" / NAME
        where.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)


def parent(path: str) -> PodSandboxConfig:
    linux = LinuxPodSandboxConfig(cgroup_parent=path)
    return PodSandboxConfig(metadata=PodSandboxMetadata(name="a"), linux=linux)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "a",
        "system.slice",
        "/a/../b",
        "/../../a",
        "/a b:c",
        "/ü" * 100,
        "/" + "x" * 255,
        "/x" * 1900,
        "/cpu/new",
    ],
)
def test_below_what_a_cgroup_can_be(root: Path, path: str) -> None:
    """Whether that is there or not."""
    (root / "cpu" / "system.slice").mkdir(parents=True)
    cgroups.require_cgroup_parent(parent(path))
    cgroups.require_cgroup_parent(PodSandboxConfig(metadata=PodSandboxMetadata(name="a")))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/a\nb", "no cgroup's name has a newline"),
        ("/" + "x" * 256, "more than 255 bytes"),
        ("a/" + "ü" * 128, "more than 255 bytes"),
        ("/x" * 1900 + "y", "it has more than 3800 bytes"),
        ("/tasks", "'.*/cpu/tasks' is a file"),
        ("system.slice/./cpu.shares/x", "'.*/cpu/system.slice/cpu.shares' is a file"),
        ("/cgroup.procs", "'.*/cgroup.procs' is a file"),
    ],
)
def test_below_what_none_can_be(root: Path, path: str, why: str) -> None:
    """For the kernel would refuse it when a container is started."""
    (root / "cpu" / "system.slice").mkdir(parents=True)
    for name in ("cpu/tasks", "cpu/system.slice/cpu.shares", "cgroup.procs"):
        (root / name).touch()
    with pytest.raises(InvalidInputError, match=rf"^cgroup_parent .*: .*{why}"):
        cgroups.require_cgroup_parent(parent(path))


def test_use_by_version_1(root: Path) -> None:
    """Each from its own hierarchy; what is cached and not in use is no working set."""
    fill(root, V1_USE)
    assert cgroups.measure([*V1, *OTHER], NAME) == (123_456_789, 5000, 4000, 3)


@pytest.mark.parametrize("where", ["", "unified"])
def test_use_by_version_2(root: Path, where: str) -> None:
    """Processor time is told in microseconds there."""
    fill(root / where, V2_USE)
    assert cgroups.measure([*OTHER, *V2], NAME) == (42_000, 7000, 4000, 2)


def test_a_quota_is_lifted(root: Path) -> None:
    """By the word of each version, in whatever hierarchy the controller is."""
    fill(root, {"cpu,cpuacct/cpu.cfs_quota_us": "20000\n"})
    fill(root / "unified", {"cpu.max": "20000 100000\n", "cpu.weight": "7\n"})
    cgroups.lift_quota([*V1, *OTHER, *V2], NAME)
    assert (root / "cpu,cpuacct/limpet" / NAME / "cpu.cfs_quota_us").read_text() == "-1"
    assert (root / "unified/limpet" / NAME / "cpu.max").read_text() == "max"
    assert (root / "unified/limpet" / NAME / "cpu.weight").read_text() == "7\n"


@pytest.mark.parametrize("order", [1, -1])
def test_use_where_both_versions_are(root: Path, order: int) -> None:
    """A controller counts in one of them: what version 1 counts is not taken from 2, and what it does not count is."""
    fill(root, {key: text for key, text in V1_USE.items() if not key.startswith("pids")})
    fill(root / "unified", {"cgroup.procs": "", "pids.current": "2\n"})
    lines = [*V1, *OTHER, *V2]
    assert cgroups.measure(lines[::order], NAME) == (123_456_789, 5000, 4000, 2)


def test_what_is_not_counted_is_not_told(root: Path) -> None:
    """No number is made up, and no working set is below nothing."""
    assert cgroups.measure([*V1, *V2], NAME) == (None, None, None, None)
    fill(root, {"memory/memory.usage_in_bytes": "500\n", "memory/memory.stat": "total_inactive_file 900\n"})
    fill(root, {"pids/pids.current": "max\n"})
    assert cgroups.measure(V1, NAME) == (None, 500, 0, None)
    (root / "memory/limpet" / NAME / "memory.stat").unlink()
    assert cgroups.measure(V1, NAME) == (None, 500, 500, None)


def test_processes_of_its_own_cgroups_alone(root: Path) -> None:
    """Those of all versions, once each; ours, and those of other pid namespaces (0), are nobody's to signal."""
    fill(root, {"pids/cgroup.procs": f"12\n{os.getpid()}\n0\n", "memory/cgroup.procs": "12\n13\n"})
    fill(root / "unified", {"cgroup.procs": "14\n"})
    (root / "cpuset/limpet").mkdir(parents=True)
    (root / "cpuset/limpet/cgroup.procs").write_text("1\n")
    assert cgroups.list_processes([*V1, *V2, *OTHER], NAME) == {12, 13, 14}
    assert cgroups.list_processes(OTHER, NAME) == set()


@pytest.mark.parametrize("is_own", [True, False])
def test_where_a_part_of_a_hierarchy_is_mounted(root: Path, monkeypatch: pytest.MonkeyPatch, *, is_own: bool) -> None:
    """As for an engine in a container of Docker's: /proc tells the host's paths, and its own cgroups are mounted."""
    fill(root, {"memory/cgroup.procs": "12\n"})
    fill(root / "memory" / "2", {"cgroup.procs": "13\n"})
    part = "/docker/1" if is_own else "/docker/12"
    mounted = Mount("0:31", "/docker/1", f"{root}/memory", "cgroup", frozenset({"memory"}))
    monkeypatch.setattr(cgroups, "read_mounts", lambda: [mounted])
    assert cgroups.list_processes([f"4:memory:{part}/limpet/{NAME}"], NAME) == ({12} if is_own else set())
    hosts = [line.split(":") for line in cgroups.make_lines("/x")]
    assert {path for _, name, path in hosts if name == "memory"} <= {"/docker/1/x"}
    assert {path for _, name, path in hosts if name != "memory"} == {"/x"}


def test_signals_reach_all_of_them(root: Path) -> None:
    """Each gets it, and they are counted; 0 counts alone."""
    with subprocess.Popen(["sleep", "1000"]) as one, subprocess.Popen(["sleep", "1000"]) as two:
        fill(root, {"pids/cgroup.procs": f"{one.pid}\n{two.pid}\n"})
        assert cgroups.signal_processes(V1, NAME, 0) == 2
        assert (one.poll(), two.poll()) == (None, None)
        assert cgroups.signal_processes(V1, NAME, signal.SIGTERM) == 2
        assert [each.wait(20) for each in (one, two)] == [-signal.SIGTERM] * 2
    assert cgroups.signal_processes(V1, NAME, signal.SIGKILL) == 2  # both are gone: that is no error


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"freezer/freezer.self_freezing": "0\n", "freezer/freezer.state": "FROZEN\n"}, False),
        ({"freezer/freezer.self_freezing": "1\n", "freezer/freezer.state": "FREEZING\n"}, True),
        ({"memory/freezer.self_freezing": "1\n", "freezer/freezer.self_freezing": "0\n"}, False),
        ({"cgroup.freeze": "1\n", "cgroup.events": "populated 1\nfrozen 0\n"}, True),
        ({"cgroup.freeze": "0\n", "cgroup.events": "populated 1\nfrozen 1\n"}, False),
    ],
)
def test_whether_it_is_frozen(root: Path, files: dict[str, str], expected: bool) -> None:
    """By what its own cgroups were told: amid it counts, and what a cgroup above was told does not."""
    fill(root, files)
    assert cgroups.is_frozen([*V1, *V2], NAME) is expected


@pytest.mark.parametrize(
    ("frozen", "lines"),
    [
        (f"freezer/limpet/{NAME}/freezer.self_freezing", V1),
        ("freezer/limpet/freezer.self_freezing", V1),
        ("limpet/cgroup.freeze", V2),
        ("unified/limpet/cgroup.freeze", [*V1, *V2]),
    ],
)
def test_which_cgroup_has_frozen_it(root: Path, frozen: str, lines: list[str]) -> None:
    """Its own, or one above, in whatever version; it is told also of a place where none is yet."""
    fill(root, {"freezer/freezer.self_freezing": "0\n", "cgroup.freeze": "0\n", "pids/cgroup.freeze": "1\n"})
    fill(root / "unified", {"cgroup.freeze": "0\n"})
    for path in ("freezer/limpet/freezer.self_freezing", "limpet/cgroup.freeze", "unified/limpet/cgroup.freeze"):
        (root / path).write_text("0\n")
    assert cgroups.find_frozen([*V1, *OTHER, *V2], NAME) == cgroups.find_frozen_place(f"/limpet/{NAME}") == ""
    (root / frozen).write_text("1\n")
    assert cgroups.find_frozen(lines, NAME) == os.path.dirname(root / frozen)
    assert cgroups.find_frozen_place(f"/limpet/{NAME}") == os.path.dirname(root / frozen)
    assert cgroups.find_frozen_place("/elsewhere/one") == ""


@pytest.mark.parametrize(("tell", "word", "number"), [(cgroups.thaw, "THAWED", "0"), (cgroups.freeze, "FROZEN", "1")])
def test_it_is_frozen_and_thawed_in_both_versions(
    root: Path, tell: Callable[[list[str], str], None], word: str, number: str
) -> None:
    """In the freezer's hierarchy by a word, in version 2 by a number; nothing is written elsewhere."""
    fill(root, {"freezer/freezer.state": "\n", "memory/freezer.state": "", "cgroup.freeze": "\n"})
    tell([*V1, *V2], NAME)
    below = Path("limpet", NAME)
    assert (root / "freezer" / below / "freezer.state").read_text() == word
    assert (root / below / "cgroup.freeze").read_text() == number
    assert (root / "memory" / below / "freezer.state").read_text() == ""
    assert sorted(path.name for path in (root / "memory" / below).iterdir()) == ["freezer.state"]


def test_what_is_not_frozen_needs_no_thawing(root: Path) -> None:
    """A stop thaws first; where cgroups are read-only, as for a unit with ProtectControlGroups, it could do nothing."""
    told = {"freezer/freezer.self_freezing": "0\n", "cgroup.freeze": "0\n"}
    fill(root, {**told, "freezer/freezer.state": "THAWED\n"})
    below = Path("limpet", NAME)
    cgroups.thaw([*V1, *V2], NAME)
    assert (root / "freezer" / below / "freezer.state").read_text() == "THAWED\n"
    assert (root / below / "cgroup.freeze").read_text() == "0\n"
    fill(root, {"freezer/freezer.self_freezing": "1\n", "cgroup.freeze": "1\n"})
    cgroups.thaw([*V1, *V2], NAME)
    assert (root / "freezer" / below / "freezer.state").read_text() == "THAWED"
    assert (root / below / "cgroup.freeze").read_text() == "0"


def test_it_is_asked_again_until_it_is_frozen(root: Path) -> None:
    """And no longer than there is time; where nothing is frozen by version 1, nothing is waited for."""
    assert cgroups.await_frozen([*V1, *V2], NAME, 0)
    fill(root, {"freezer/freezer.state": "FROZEN\n"})
    assert cgroups.await_frozen(V1, NAME, 0)
    state = root / "freezer/limpet" / NAME / "freezer.state"
    state.write_text("FREEZING\n")
    assert not cgroups.await_frozen(V1, NAME, -1)
    assert state.read_text() == "FREEZING\n"
    assert cgroups.await_frozen(V1, NAME, 20)  # the file says what it was told, which is enough here
    assert state.read_text() == "FROZEN"


def test_its_cgroups_are_removed_and_what_is_left_is_told(root: Path) -> None:
    """With those below them, the lowest first; another's beside them stays."""
    lines = [*V1, *V2, *OTHER]
    for each in ("freezer", "memory", "pids"):
        (root / each / "limpet" / NAME / "below" / "deep").mkdir(parents=True)
    (root / "pids/limpet/other").mkdir()
    busy = root / "memory/limpet" / NAME / "below"
    (busy / "process").touch()  # a directory that is not empty stands for a cgroup that is in use
    assert cgroups.remove(lines, NAME) == [str(busy), str(busy.parent)]
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir()) == [
        "freezer",
        "freezer/limpet",
        "memory",
        "memory/limpet",
        f"memory/limpet/{NAME}",
        f"memory/limpet/{NAME}/below",
        "pids",
        "pids/limpet",
        "pids/limpet/other",
    ]
    (busy / "process").unlink()
    assert cgroups.remove(lines, NAME) == []
