"""The mounts of an OCI container, as they are written down for its runtime: pure, of its config."""

import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from limpet.engine.starters.host_path import require_plain
from limpet.engine.starters.oci.mounts import add_held, make_mounts, require_directory
from limpet.schema.cri import ContainerConfig, ContainerMetadata, ImageSpec, Mount
from limpet.schema.errors import InvalidInputError


def config(*mounts: Mount) -> ContainerConfig:
    return ContainerConfig(metadata=ContainerMetadata(name="one"), image=ImageSpec(image="box:1"), mounts=mounts)


def make(
    *mounts: Mount, privileged: bool = False, has_own_network: bool = True, has_host_ipc: bool = False
) -> dict[str, dict[str, Any]]:
    found = make_mounts(
        config(*mounts), privileged=privileged, has_own_network=has_own_network, has_host_ipc=has_host_ipc
    )
    assert len({mount["destination"] for mount in found}) == len(found)
    return {mount["destination"]: mount for mount in found}


def test_what_the_host_shares_is_there_for_who_shares_its_namespaces_alone() -> None:
    """The host's /dev/shm with its IPC namespace, its /sys with its network; else there are new ones."""
    own = make()
    assert (own["/dev/shm"]["type"], own["/sys"]["type"]) == ("tmpfs", "sysfs")
    ipc = make(has_host_ipc=True)
    assert (ipc["/dev/shm"]["type"], ipc["/dev/shm"]["source"], ipc["/sys"]["type"]) == ("bind", "/dev/shm", "sysfs")
    network = make(has_own_network=False)
    assert (network["/dev/shm"]["type"], network["/sys"]["type"], network["/sys"]["source"]) == (
        "tmpfs",
        "bind",
        "/sys",
    )


@pytest.mark.parametrize("privileged", [False, True])
@pytest.mark.parametrize("has_own_network", [False, True])
def test_only_a_privileged_one_writes_to_the_kernel(privileged: bool, has_own_network: bool) -> None:
    """In /sys and its cgroups; everything that is the host's to protect is neither executed nor a device."""
    found = make(privileged=privileged, has_own_network=has_own_network)
    for path in ("/sys", "/sys/fs/cgroup"):
        assert ("rw" in found[path]["options"]) is privileged
        assert ("ro" in found[path]["options"]) is not privileged
    for path in ("/sys", "/sys/fs/cgroup", "/proc", "/dev/mqueue", "/dev/shm"):
        assert {"nosuid", "noexec", "nodev"} <= set(found[path]["options"])


def test_the_configs_mounts_take_the_place_of_ours(tmp_path: Path) -> None:
    """Outer ones come first, whatever the order that they were asked for in, and after all that everyone has."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("a")
    deep = Mount(container_path="/data/b/c", host_path=str(tmp_path / "b"), readonly=True)
    outer = Mount(container_path="/data//", host_path=str(tmp_path / "link"))
    shm = Mount(container_path="/dev/shm/", host_path=str(tmp_path / "b"))
    found = make_mounts(config(deep, outer, shm), privileged=False, has_own_network=True, has_host_ipc=True)
    assert [mount["destination"] for mount in found[-3:]] == ["/data//", "/dev/shm/", "/data/b/c"]
    assert [mount["source"] for mount in found[-3:]] == [str(tmp_path / name) for name in ("a", "b", "b")]
    assert [("ro" in each["options"], "rw" in each["options"]) for each in found[-3:]] == [
        (False, True),
        (False, True),
        (True, False),
    ]
    assert [mount["destination"] for mount in found].count("/dev/shm") == 0
    held = {"/dev/shm": "/run/shm", "/etc/hosts": "/run/hosts", "/dev/mqueue": "/run/mqueue"}
    kept = {mount["destination"]: mount for mount in add_held(found, config(deep, outer, shm), held, is_read_only=True)}
    assert "/dev/shm" not in kept
    assert (kept["/etc/hosts"]["source"], "ro" in kept["/etc/hosts"]["options"]) == ("/run/hosts", True)
    assert (kept["/dev/mqueue"]["source"], "rw" in kept["/dev/mqueue"]["options"]) == ("/run/mqueue", True)
    assert list(kept)[-3:] == ["/data//", "/dev/shm/", "/data/b/c"]


@pytest.mark.parametrize("path", ["", "/", "//", "/.", "/a/..", "../..", "data", "/a\0b"])
def test_nothing_is_mounted_over_the_root_or_nowhere(path: str) -> None:
    """A mount is at an absolute path below the root."""
    with pytest.raises(InvalidInputError, match=r"mounts\.container_path .* an absolute path below / is needed"):
        make(Mount(container_path=path, host_path="/tmp"))


@pytest.mark.parametrize("path", ["", "tmp", "/no/such/directory", "/tmp\0"])
def test_what_is_not_there_is_not_mounted(path: str) -> None:
    """It is refused before anything is made, by its name."""
    with pytest.raises(InvalidInputError, match=r"mounts\.host_path .* does not exist, or is not absolute"):
        make(Mount(container_path="/data", host_path=path))


@pytest.mark.parametrize(
    "path",
    [
        "/proc/self/status",
        "/proc/thread-self/ns/net",
        "/proc/PID/cwd",
        "/proc/self/root/etc",
        "/proc/../proc/./self",
        "/proc/mounts",
        "/dev/fd",
        "/dev/stdin",
    ],
)
def test_what_is_another_file_for_each_process_is_not_mounted(tmp_path: Path, path: str) -> None:
    """It would be the engine's, or the runtime's: refused, by whatever links it is reached."""
    path = path.replace("PID", str(os.getpid()))
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "relative").symlink_to("link")
    for host_path in (path, str(tmp_path / "link"), str(tmp_path / ".." / tmp_path.name / "relative")):
        with pytest.raises(InvalidInputError, match=r"mounts\.host_path .* a link of /proc is on its way"):
            make(Mount(container_path="/data", host_path=host_path))


@pytest.mark.parametrize("path", ["/no/such/directory", "/etc/passwd/x", "/proc/0", "relative"])
def test_what_leads_nowhere_leads_through_no_process(path: str) -> None:
    """Nor does what cannot be followed: whoever asks says that it is not there."""
    require_plain("mounts.host_path", path)


def test_what_is_the_same_for_all_is_mounted(tmp_path: Path) -> None:
    """/proc itself, a process in it, and whatever other links lead to."""
    (tmp_path / "link").symlink_to("../../../../../../../../proc/uptime")
    for host_path, source in (
        ("/proc", "/proc"),
        ("/proc/1/comm", "/proc/1/comm"),
        (tmp_path / "link", "/proc/uptime"),
    ):
        assert make(Mount(container_path="/data", host_path=str(host_path)))["/data"]["source"] == source


@pytest.mark.parametrize(("first", "second"), [("/data", "/data"), ("/data", "//data/"), ("/a/../data", "/./data")])
def test_no_mount_hides_another(first: str, second: str) -> None:
    """Of two at one place only the last would be seen."""
    with pytest.raises(InvalidInputError, match=r"mounts\.container_path .*: another one is there"):
        make(Mount(container_path=first, host_path="/tmp"), Mount(container_path=second, host_path="/etc"))


def test_nothing_is_mounted_on_what_the_runtimes_make(tmp_path: Path) -> None:
    """It would be hidden, or be written into as if it were /dev/null."""
    for path, why in (("/dev/ptmx", "its own there"), ("//dev/console", "its own there"), ("/dev/./null", "into it")):
        asked = config(Mount(container_path=path, host_path="/tmp"))
        with pytest.raises(InvalidInputError, match=why):
            make_mounts(replace(asked, tty=True), privileged=False, has_own_network=True, has_host_ipc=False)
    beside = replace(config(Mount(container_path="/dev/a", host_path="/tmp")), tty=True)
    found = make_mounts(beside, privileged=False, has_own_network=True, has_host_ipc=False)
    assert found[-1]["destination"] == "/dev/a"
    assert make(Mount(container_path="/dev/console", host_path="/tmp"))["/dev/console"]["source"] == "/tmp"
    assert make(Mount(container_path="/dev/null", host_path="/dev/null"))["/dev/null"]["source"] == "/dev/null"


@pytest.mark.parametrize("path", ["/proc", "//proc", "///dev/shm"])
def test_two_slashes_are_one(path: str) -> None:
    """What every container has is not mounted beside what takes its place."""
    found = make_mounts(
        config(Mount(container_path=path, host_path="/tmp")),
        privileged=False,
        has_own_network=True,
        has_host_ipc=False,
    )
    assert [each["source"] for each in found if os.path.realpath(each["destination"]) == f"/{path.lstrip('/')}"] == [
        "/tmp"
    ]


def test_no_working_directory_is_made_on_a_read_only_mount(tmp_path: Path) -> None:
    """crun makes it on the host all the same; what is there, or may be by a link, or may be made, is not refused."""
    (tmp_path / "there/below").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/data/there")
    plain = Mount(container_path="//data/", host_path=str(tmp_path))
    for mount in (replace(plain, readonly=True), replace(plain, recursive_read_only=True)):
        asked = config(mount)
        for path in ("/data", "/data/there/../there//below", "/data/link", "/data/link/none", "/database/x", "/", "/x"):
            require_directory(path, asked)
        for path in ("/data/new", "/data/there/new/sub", "/data/file", "//x/../data/new"):
            with pytest.raises(InvalidInputError, match=r"working_dir .*: the mount at '/data' is read-only"):
                require_directory(path, asked)
    free = Mount(container_path="/data/there", host_path=str(tmp_path))
    require_directory("/data/new", config(plain))
    require_directory("/data/there/new", replace(asked, mounts=(free, *asked.mounts)))
    with pytest.raises(InvalidInputError, match="the mount at '/data' is read-only"):
        require_directory("/data/new", replace(asked, mounts=(*asked.mounts, free)))
