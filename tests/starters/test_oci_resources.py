"""Devices and scores of an OCI container, as they are written down for its runtime: pure, of its config."""

import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine.starters.oci import resources
from limpet.engine.starters.oci.resources import (
    choose_oom_score,
    find_unrestricted,
    make_devices,
    make_host_devices,
    walk_devices,
)
from limpet.schema.cri import ContainerConfig, ContainerMetadata, Device, ImageSpec, LinuxContainerResources, Mount
from limpet.schema.errors import InvalidInputError


def find_devices(directory: str) -> dict[str, str]:
    """The devices below a directory, with the runtime-spec's letters for what they are."""
    found = {}
    for path in (os.path.join(top, name) for top, _, names in os.walk(directory) for name in names):
        with suppress(FileNotFoundError):
            mode = os.lstat(path).st_mode
            if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
                found[path] = "b" if stat.S_ISBLK(mode) else "c"
    return found


def config(*devices: Device, tty: bool = False) -> ContainerConfig:
    return ContainerConfig(
        metadata=ContainerMetadata(name="one"), image=ImageSpec(image="box:1"), devices=devices, tty=tty
    )


@pytest.mark.parametrize(("permissions", "access"), [("", "rwm"), ("r", "r"), ("mw", "mw")])
@pytest.mark.parametrize("privileged", [False, True])
def test_a_device_is_made_and_allowed(tmp_path: Path, permissions: str, access: str, privileged: bool) -> None:
    """With the host's number, mode and owner, at its own path or another; all others stay as they are."""
    asked = Device(host_path="/dev/full", permissions=permissions)
    elsewhere = Device(host_path="/dev/null", container_path="/dev/mine", permissions=permissions)
    devices, rules = make_devices(config(asked, elsewhere), str(tmp_path), privileged=privileged)
    assert [(each["path"], each["type"], each["major"], each["minor"]) for each in devices] == [
        ("/dev/full", "c", 1, 7),
        ("/dev/mine", "c", 1, 3),
    ]
    found = os.stat("/dev/full")
    assert (devices[0]["fileMode"], devices[0]["uid"], devices[0]["gid"]) == (
        stat.S_IMODE(found.st_mode),
        found.st_uid,
        found.st_gid,
    )
    assert rules == [
        {"allow": privileged, "access": "rwm"},
        {"allow": True, "type": "c", "major": 1, "minor": 7, "access": access},
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": access},
    ]


@pytest.mark.parametrize(
    ("device", "why"),
    [
        (Device(host_path="/no/such/device"), "it is not there"),
        (Device(host_path="/dev/null\0"), "it is not there"),
        (Device(host_path="/etc"), "a device is needed"),
        (Device(host_path="/dev/null", permissions="rx"), "permissions of 'rwm'"),
        (Device(host_path="/dev/null", container_path="mine"), "an absolute path without"),
        (Device(host_path="/dev/null", container_path="/dev/../mine"), "an absolute path without"),
        (Device(host_path="/dev/null", container_path="/dev//ptmx"), "the container has its own there"),
        (Device(host_path="/dev/null", container_path="/dev/console"), "the container has its own there"),
        (Device(host_path="/dev/null", container_path="/etc/there"), "the image has something there"),
        (Device(host_path="/dev/null", container_path="//dev/pts/7"), "no device can be made there"),
        (Device(host_path="/dev/null", container_path="/proc/mine"), "no device can be made there"),
        (Device(host_path="/dev/null", container_path="/dev/ptmx/x"), "a device is on its way"),
        (Device(host_path="/dev/null", container_path="/dev/console/x/y"), "a device is on its way"),
        (Device(host_path="/dev/null", container_path="/dev/mqueue"), "a file system of its own there"),
        (Device(host_path="/dev/null", container_path="/dev/pts/"), "a file system of its own there"),
        (Device(host_path="/dev/null", container_path="//dev/shm"), "a file system of its own there"),
        (Device(host_path="/dev/null", container_path="/dev/shm/x"), "a file system of its own there"),
    ],
)
def test_what_can_be_no_device_is_refused(tmp_path: Path, device: Device, why: str) -> None:
    """The runtimes would pass over some of it without a word."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/there").touch()
    with pytest.raises(InvalidInputError, match=why):
        make_devices(config(device, tty=True), str(tmp_path), privileged=False)


def test_a_privileged_one_has_the_hosts_devices(tmp_path: Path) -> None:
    """With their numbers, modes and owners; not what is its own, what the config has instead, nor below a mount."""
    made, _ = make_devices(
        config(Device(host_path="/dev/null", container_path="//dev/full")), str(tmp_path), privileged=True
    )
    before = find_devices("/dev")
    found = {each["path"]: each for each in make_host_devices(config(tty=True), made)}
    there = before | find_devices("/dev")  # others may make a device or take one away meanwhile, as losetup does
    zero = os.stat("/dev/zero")
    assert found["/dev/zero"] == {
        "path": "/dev/zero",
        "type": "c",
        "major": 1,
        "minor": 5,
        "fileMode": stat.S_IMODE(zero.st_mode),
        "uid": zero.st_uid,
        "gid": zero.st_gid,
    }
    own = ("/dev/pts/", "/dev/shm/", "/dev/mqueue/", "/dev/full", "/dev/ptmx", "/dev/console")
    assert not [path for path in found if path.startswith((*own, "/dev/fd/"))]
    assert all(path in there or not os.path.lexists(path) for path in found)
    assert {path for path in before.keys() & find_devices("/dev").keys() if not path.startswith(own)} <= found.keys()
    assert all(each["type"] == there[path] for path, each in found.items() if path in there)
    over = config()
    for place, left in (("/dev", set()), ("//dev/zero", {"/dev/null", "/dev/random"})):
        mounted = replace(over, mounts=(Mount(container_path=place, host_path="/tmp"),))
        names = {each["path"] for each in make_host_devices(mounted, made)}
        assert names & {"/dev/zero", "/dev/null", "/dev/random"} == left


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_that_goes_meanwhile_hides_no_other(tmp_path: Path) -> None:
    """Unplugged between the look at the directory and the one at the device, or with a directory of its own."""
    for name in ("a", "b", "d"):
        os.mknod(tmp_path / name, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    (tmp_path / "c").mkdir()
    walk = walk_devices(str(tmp_path), ())
    found = [next(walk)["path"]]
    (tmp_path / "b").unlink()
    (tmp_path / "c").rmdir()
    assert found + [each["path"] for each in walk] == [f"{tmp_path}/a", f"{tmp_path}/d"]


def test_two_devices_at_one_place_are_refused(tmp_path: Path) -> None:
    """The runtimes make the first alone; and a mount hides a device."""
    one = Device(host_path="/dev/null", container_path="/dev/x")
    other = Device(host_path="/dev/zero", container_path="//dev/./x")
    with pytest.raises(InvalidInputError, match=r"devices\.container_path '//dev/\./x': a mount or another device"):
        make_devices(config(one, other), str(tmp_path), privileged=False)
    mount = Mount(container_path="//dev/x/", host_path="/tmp")
    with pytest.raises(InvalidInputError, match="a mount or another device is there"):
        make_devices(replace(config(one), mounts=(mount,)), str(tmp_path), privileged=False)


def test_a_device_below_a_mount(tmp_path: Path) -> None:
    """The runtimes would make it in the host's directory, or pass over it. One that is there already is allowed."""
    root, host = tmp_path / "root", tmp_path / "host"
    root.mkdir()
    host.mkdir()
    mounts = (Mount(container_path="/dev/data/", host_path=str(host)),)
    asked = replace(config(Device(host_path="/dev/null", container_path="/dev/data/x")), mounts=mounts)
    with pytest.raises(InvalidInputError, match=r"it is below the mount at '/dev/data/', and would be made on the"):
        make_devices(asked, str(root), privileged=False)
    (host / "x").symlink_to("/dev/zero")  # another
    with pytest.raises(InvalidInputError, match="would be made on the host"):
        make_devices(asked, str(root), privileged=False)
    (host / "x").unlink()
    (host / "x").symlink_to("/dev/null")
    devices, rules = make_devices(asked, str(root), privileged=False)
    assert (devices, rules[1:]) == ([], [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}])
    all_devices = replace(
        config(Device(host_path="/dev/full")), mounts=(Mount(container_path="/dev", host_path="/dev"),)
    )
    devices, rules = make_devices(all_devices, str(root), privileged=False)
    assert (devices, len(rules)) == ([], 2)


def test_a_path_is_given_as_it_is_compared(tmp_path: Path) -> None:
    """crun makes none at a path that ends with a slash."""
    devices, _ = make_devices(
        config(Device(container_path="//dev/./x//", host_path="/dev/null")), str(tmp_path), privileged=False
    )
    assert [each["path"] for each in devices] == ["/dev/x"]


def test_without_root_a_device_has_its_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runc mounts what the host has at the path in the container, and takes nothing from elsewhere."""
    monkeypatch.setattr(resources, "is_rootless", lambda: True)
    with pytest.raises(InvalidInputError, match=r"devices\.container_path '/dev/x': an engine that is .* has it at"):
        make_devices(config(Device(container_path="/dev/x", host_path="/dev/null")), str(tmp_path), privileged=False)
    for asked in (Device(container_path="/dev/full", host_path="/dev//full"), Device(host_path="/dev/full")):
        devices, _ = make_devices(config(asked), str(tmp_path), privileged=False)
        assert [each["path"] for each in devices] == ["/dev/full"]


@pytest.mark.parametrize(
    ("permissions", "privileged", "rootless", "why"),
    [
        ("r", False, False, "runc lets every container read and write '/dev/full'"),
        ("rm", False, False, "runc lets every container read and write '/dev/full'"),
        ("m", False, False, "runc lets every container read and write '/dev/full'"),
        ("rw", False, False, ""),
        ("r", True, False, "a privileged container"),
        ("r", False, True, "restricts none"),
        ("rw", True, True, "restricts none"),
        ("mwr", True, False, ""),
        ("", False, True, ""),
    ],
)
def test_what_permissions_do_not_restrict(
    monkeypatch: pytest.MonkeyPatch, permissions: str, privileged: bool, rootless: bool, why: str
) -> None:
    """It is told why."""
    monkeypatch.setattr(resources, "is_rootless", lambda: rootless)
    asked = config(Device(host_path="/dev/full", permissions=permissions))
    found = find_unrestricted(asked, privileged=privileged, kind="runc", makes_nodes=False)
    assert (why in found) if why else found == ""


def test_a_device_of_whoever_looks_is_refused(tmp_path: Path) -> None:
    """As /dev/stdin where that is a terminal: it would be the engine's."""
    terminal, other = os.openpty()
    try:
        with pytest.raises(InvalidInputError, match="a link of /proc is on its way"):
            make_devices(config(Device(host_path=f"/dev/fd/{other}")), str(tmp_path), privileged=False)
    finally:
        os.close(terminal)
        os.close(other)


def test_what_is_free_may_be_a_device(tmp_path: Path) -> None:
    """A console where there is no terminal, a path outside of /dev that the image has not."""
    for path in ("/dev/console", "/mine"):
        asked = Device(host_path="/dev/null", container_path=path)
        devices, _ = make_devices(config(asked), str(tmp_path), privileged=False)
        assert [each["path"] for each in devices] == [path]


@pytest.mark.parametrize(
    ("asked", "lowest", "score"), [(None, -1000, 0), (None, 300, 300), (-5, -1000, -5), (-5, 0, 0), (700, 300, 700)]
)
def test_the_score_is_the_one_asked_for_or_the_lowest_to_be_had(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, lowest: int, score: int
) -> None:
    """0 where nothing is asked for: what conmon has is not the container's."""
    monkeypatch.setattr(resources, "lowest_oom_score", lambda: lowest)
    assert choose_oom_score(None if asked is None else LinuxContainerResources(oom_score_adj=asked)) == score
