"""Paths in a container at which nothing can be: refused at create, by the field's name, and what is in the way."""

import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from limpet import Engine, errors
from limpet.engine.starters.oci.places import require_places, require_working_directory
from limpet.schema.cri import (
    ContainerConfig,
    ContainerMetadata,
    ImageSpec,
    LinuxContainerConfig,
    LinuxContainerSecurityContext,
    Mount,
)
from limpet.schema.errors import InvalidInputError
from tests.starters.oci import RUNTIMES, config


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A root file system with a directory, a file, and links to both; the host's are beside it."""
    for name in ("root/directory/below", "root/dev", "host/directory", "host/with/null"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("root/file", "host/file"):
        (tmp_path / name).touch()
    for name, target in (
        ("to-file", "/file"),
        ("to-directory", "../../directory"),
        ("to-nothing", "none"),
        ("to-dev", "/dev"),
        ("to-itself", "to-itself"),
    ):
        (tmp_path / "root" / name).symlink_to(target)
    return str(tmp_path / "root")


def asked(root: str, *mounts: tuple[str, str], **context: Any) -> ContainerConfig:
    """A config with these mounts, of what is beside the root."""
    host = os.path.join(os.path.dirname(root), "host")
    return ContainerConfig(
        metadata=ContainerMetadata(name="one"),
        image=ImageSpec(image="box:1"),
        mounts=tuple(
            Mount(container_path=path, host_path=os.path.normpath(os.path.join(host, name))) for path, name in mounts
        ),
        linux=LinuxContainerConfig(security_context=LinuxContainerSecurityContext(**context)),
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/directory", "directory"),
        ("//directory/below/new/", "directory"),
        ("/directory/../new/file", "file"),
        ("/to-directory/new", "file"),
        ("/to-directory", "directory"),
        ("/to-file", "file"),
        ("/to-nothing/below", "file"),
        ("/to-itself/below", "file"),
        ("/new", "file"),
        ("/to-dev/null/below", "file"),
        ("/proc", "/proc"),
        ("/proc/uptime", "file"),
        ("/sys", "directory"),
        ("/sys/kernel", "directory"),
        ("/sys/fs/cgroup/mine", "directory"),
        ("/dev", "with"),
        ("/dev/mine", "file"),
        ("/dev/pts", "directory"),
    ],
)
def test_what_can_be_mounted(root: str, path: str, name: str) -> None:
    """Also where the image has nothing yet, and what is not looked into."""
    for is_runc in (True, False):
        require_places(asked(root, (path, name)), root, is_runc=is_runc)


@pytest.mark.parametrize(
    ("path", "name", "why"),
    [
        ("/file", "directory", "a file is there, and the host's '.*/host/directory' is a directory"),
        ("//directory/.", "file", "a directory is there, and the host's '.*/host/file' is a file"),
        ("/to-file", "directory", "a file is there"),
        ("/to-directory", "file", "a directory is there"),
        ("/file/below", "file", "the image has at '/file' what is no directory"),
        ("/file/below/more", "directory", "the image has at '/file' what is no directory"),
        ("/to-file/below", "file", "the image has at '/to-file' what is no directory"),
        ("/proc/nosuch", "file", "nothing there|nobody make it"),
        ("/sys/nosuch", "directory", "the kernel lets nobody make it"),
        ("/dev/pts/0", "file", "the kernel lets nobody make it"),
        ("/dev/mqueue/mine", "file", "the kernel lets nobody make it"),
        ("/dev", "directory", "the runtimes need a null there"),
        ("/" + "x" * 256, "file", "a name in it has more than 255 bytes"),
        ("/ab" + "/ü" * 127 + "/" + "ü" * 128, "file", "a name in it has more than 255 bytes"),
        ("/x" * 2048, "file", r"it has more than \d+ bytes"),
    ],
)
def test_what_cannot_be_mounted(root: str, path: str, name: str, why: str) -> None:
    """For both runtimes."""
    for is_runc in (True, False):
        with pytest.raises(InvalidInputError, match=rf"^mounts\.container_path .*({why})"):
            require_places(asked(root, (path, name)), root, is_runc=is_runc)


def test_what_runc_does_not_mount(root: str) -> None:
    """In /proc: crun does."""
    for path, name in (("/proc", "directory"), ("/proc/sys", "directory"), ("/proc/1", "directory")):
        require_places(asked(root, (path, name)), root, is_runc=False)
        with pytest.raises(InvalidInputError, match=r"^mounts\.container_path .*: runc "):
            require_places(asked(root, (path, name)), root, is_runc=True)


def test_what_is_on_another_mount_is_not_looked_into(root: str) -> None:
    """It hides what the image has there, and what the kernel has."""
    for path in ("/file/below", "/proc/nosuch", "/dev/pts/0"):
        with pytest.raises(InvalidInputError):
            require_places(asked(root, (path, "file")), root, is_runc=True)
    require_places(asked(root, ("/proc", "/proc"), ("/proc/nosuch", "file")), root, is_runc=True)
    require_places(asked(root, ("/dev", "with"), ("/dev/pts/0", "file")), root, is_runc=True)


def test_a_mount_on_another_that_has_no_place_for_it(root: str) -> None:
    """On a file, or on a read-only mount that has nothing there: crun would make that on the host all the same."""
    outer = Mount(container_path="/outer/", host_path=os.path.join(os.path.dirname(root), "host"))
    (Path(outer.host_path) / "link").symlink_to("nowhere")

    def require(path: str, **fields: bool) -> None:
        inner = Mount(container_path=path, host_path=outer.host_path)
        mounts = (inner, replace(outer, **fields))
        require_places(replace(asked(root), mounts=mounts), root, is_runc=False)

    for fields in ({}, {"readonly": True}, {"recursive_read_only": True}):
        with pytest.raises(
            InvalidInputError, match=r"^mounts\.container_path '/outer/file/x': the mount at '/outer' has"
        ):
            require("/outer/file/x", **fields)
        for path in ("/outer/directory", "/outer/link/x", "/outer//with/null"):
            require(path, **fields)
        if fields:
            with pytest.raises(InvalidInputError, match="the mount at '/outer' is read-only, and has nothing there"):
                require("/outer/directory/new", **fields)
        else:
            require("/outer/directory/new")
    most = Mount(container_path="/outer/directory", host_path=outer.host_path)
    inner = Mount(container_path="/outer/directory/new/x", host_path=outer.host_path)
    mounts = (replace(outer, readonly=True), inner, most)  # the innermost of those that it is on counts
    require_places(replace(asked(root), mounts=mounts), root, is_runc=False)


@pytest.mark.parametrize("field", ["masked_paths", "readonly_paths"])
def test_what_is_below_a_file_cannot_be_hidden(root: str, field: str) -> None:
    """Nor what has too long a name; what is missing, or is hidden by a mount, is no matter."""
    for path in ("/directory", "/file", "/to-file", "/none/below", "etc", "/proc/none", "/to-dev/null/x", "/a/../file"):
        require_places(asked(root, **{field: (path,)}), root, is_runc=True)
    require_places(asked(root, ("/file", "file"), **{field: ("/file/below",)}), root, is_runc=True)
    for path in ("/file/below", "/to-file/below", "/directory/../file/a/b", "/" + "x" * 256, "/x" * 2048):
        with pytest.raises(InvalidInputError, match=rf"^{field} .*: (the image has at|a name in it|it has more)"):
            require_places(asked(root, **{field: ("/directory", path)}), root, is_runc=True)


def test_what_is_a_file_is_no_working_directory(root: str) -> None:
    """Nor what is below one; what is missing is made, and what is mounted is not looked into."""
    for path in ("/", "/directory", "/to-directory/below", "/new/below", "/dev/null", "/to-nothing"):
        require_working_directory("working_dir", path, asked(root), root)
    require_working_directory("working_dir", "/file/below", asked(root, ("/file", "directory")), root)
    for path in ("/file", "/to-file", "/file/below", "/to-file/below"):
        with pytest.raises(InvalidInputError, match=r"^working_dir .*: the image has at '.*file' what is no directory"):
            require_working_directory("working_dir", path, asked(root), root)


@pytest.mark.parametrize("is_runc", [True, False])
@pytest.mark.parametrize("field", ["masked_paths", "readonly_paths"])
def test_what_is_different_for_each_process_cannot_be_hidden(root: str, field: str, is_runc: bool) -> None:
    """Nor can be what the runtimes need to start the program; all of these failed at the start with one of them."""
    for path in ("/proc/self", "/proc//self/fd/", "/proc/thread-self", "/dev/fd", "/dev/fd/1", "/dev/./stdin"):
        with pytest.raises(InvalidInputError, match=rf"^{field} '.*: it is another file for each process"):
            require_places(asked(root, **{field: (path,)}), root, is_runc=is_runc)
    for path, is_needed in (("/dev/", True), ("/proc", is_runc), ("/proc/selfish", False), ("/dev/shm", False)):
        config = asked(root, **{field: (path,)})
        if field == "masked_paths" and is_needed:
            with pytest.raises(InvalidInputError, match=f"^masked_paths '{path}': the runtime itself needs"):
                require_places(config, root, is_runc=is_runc)
        else:
            require_places(config, root, is_runc=is_runc)


def test_a_working_directory_that_the_kernel_does_not_have(root: str) -> None:
    """It lets nobody make one there; what is another for each process, or on a mount, is left to the start."""
    for path in ("/proc/nosuch", "/sys/nosuch/below", "/dev/pts/x", "//dev/mqueue/x"):
        with pytest.raises(InvalidInputError, match=r"^working_dir '.*: it is not there, and the kernel lets nobody"):
            require_working_directory("working_dir", path, asked(root), root)
    for path in ("/proc/self/cwd", "/proc/999999999", "/proc/sys", "/sys/fs/cgroup/x", "/dev/x"):
        require_working_directory("working_dir", path, asked(root), root)
    require_working_directory("working_dir", "/sys/nosuch", asked(root, ("/sys", "directory")), root)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_it_is_known_at_create(shared: Engine, runtime: str, tmp_path: Path) -> None:
    """A start would fail, which nobody can take back then; also for the files that each container gets."""
    mount = {"host_path": str(tmp_path)}
    for fields, why in (
        ({"mounts": [{**mount, "container_path": "/bin/busybox"}]}, "mounts.container_path '/bin/busybox': a file"),
        ({"mounts": [{**mount, "container_path": "/etc/hosts"}]}, "mounts.container_path '/etc/hosts': a file"),
        ({"working_dir": "/bin/sh"}, "working_dir '/bin/sh'"),
        (
            {"devices": [{"host_path": "/dev/full", "container_path": "/dev/null/x"}]},
            "devices.container_path '/dev/null/x': a device is on its way",
        ),
        (
            {"devices": [{"host_path": "/dev/full", "container_path": "/dev/" + "x" * 256}]},
            "devices.container_path .*: a name in it has more",
        ),
    ):
        with pytest.raises(errors.InvalidInputError, match=f"^{why}"):
            shared.create_container(config(f"never-{runtime}", "true", **fields), runtime)
    assert shared.list(name=f"never-{runtime}") == []
