"""The steps to the disk: in the order that survives a power cut, and never outside of what was named."""

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet.engine.images import DirectoryImageStore
from limpet.engine.lifecycle.bundle import ContainerBundle
from limpet.engine.state import durable
from tests.oci_layout import Layout, member, names, snapshot, tar


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was done to the disk, in order: the real calls, written down as they return."""
    done: list[tuple[str, str]] = []
    fsync, rename, mkdir, rmdir = os.fsync, os.rename, os.mkdir, os.rmdir

    def noted_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        fsync(descriptor)
        done.append(("fsync", path))

    def noted_rename(source: str, target: str) -> None:
        rename(source, target)
        done.extend([("rename from", source), ("rename", target)])

    def noted_mkdir(path: str, *arguments: int, dir_fd: int | None = None) -> None:
        mkdir(path, *arguments, dir_fd=dir_fd)
        done.append(("mkdir", path))

    def noted_rmdir(path: str, *, dir_fd: int | None = None) -> None:
        rmdir(path, dir_fd=dir_fd)
        done.append(("rmdir", str(path)))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "mkdir", noted_mkdir)
    monkeypatch.setattr(os, "rmdir", noted_rmdir)
    return done


def test_each_level_of_a_new_directory_is_durable_before_the_next(tmp_path: Path, steps: list[tuple[str, str]]) -> None:
    """mkdir, fsync of the parent, and so on down; for one that is there, a missed fsync is made up for."""
    a, b = str(tmp_path / "a"), str(tmp_path / "a/b")
    durable.make_directory(b)
    above = [("fsync", str(tmp_path.parent))]
    assert steps == [*above, ("mkdir", a), ("fsync", str(tmp_path)), ("mkdir", b), ("fsync", a)]
    steps.clear()
    durable.make_directory(b)
    assert steps == [("fsync", a)]
    assert stat.S_IMODE(os.stat(a).st_mode) == stat.S_IMODE(os.stat(b).st_mode) == 0o700


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_file_in_the_way_of_a_directory_is_an_error(tmp_path: Path, path: str) -> None:
    """Nothing is replaced to make room for a directory."""
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        durable.make_directory(str(tmp_path / path))
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_is_flushed_before_it_has_its_name_and_its_name_before_the_return(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    """Content, rename, directory: in this order."""
    path = tmp_path / "file"
    durable.write_file(str(path), b"old")
    durable.write_file(str(path), b"new", mode=0o640)
    assert [step for step, _ in steps] == 2 * ["fsync", "rename from", "rename", "fsync"]
    assert steps[0][1] == steps[1][1]
    assert steps[3] == ("fsync", str(tmp_path))
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == {"file"}


def test_a_file_that_cannot_be_renamed_leaves_nothing(tmp_path: Path) -> None:
    """After an error there is no temporary file."""
    (tmp_path / "directory/full").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        durable.write_file(str(tmp_path / "directory"), b"data")
    assert names(tmp_path) == {"directory", "directory/full"}


def test_an_image_has_its_record_only_when_all_else_is_durable(tmp_path: Path, steps: list[tuple[str, str]]) -> None:
    """Each blob is flushed before its rename and its directory after it; the record comes last and ends the same."""
    layout = Layout(tmp_path / "layout")
    layout.add_image([tar(member("a")), tar(member("b"))])
    store = DirectoryImageStore(str(tmp_path / "store"))
    steps.clear()
    store.load(str(layout.path))
    (scratch,) = [path for step, path in steps if step == "mkdir"]  # where it was unpacked to see that it can be
    kept = [step for step in steps if step[1] not in {scratch, str(tmp_path / "store")}]
    groups = [kept[start : start + 4] for start in range(0, len(kept), 4)]
    for content, source, target, directory in groups:
        assert content == ("fsync", source[1])
        assert (source[0], target[0]) == ("rename from", "rename")
        assert directory == ("fsync", os.path.dirname(target[1]))
    assert [Path(group[2][1]).parent.name for group in groups] == [*4 * ["sha256"], "images"]
    assert steps.index(("rmdir", scratch)) < steps.index(groups[-1][0])


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory that is cleared away even if it is deeper than pytest's own cleaning can go."""
    path = tempfile.mkdtemp()
    yield Path(path)
    subprocess.run(["rm", "-rf", path], check=True)


def test_removing_a_tree_follows_no_link_and_needs_no_permission_of_its_owner(scratch: Path) -> None:
    """Links are removed, not what they lead to; shut directories, odd names and great depth are no obstacle."""
    outside, tree = scratch / "outside", scratch / "tree"
    for path in [outside, tree / "shut"]:
        path.mkdir(parents=True)
    (outside / "kept").write_text("kept")
    (tree / "link").symlink_to(outside)
    (tree / "loop").symlink_to("loop")
    os.mkfifo(tree / "pipe")
    (tree / "shut/file").write_text("")
    (tree / os.fsdecode(b"\\xff\\n")).mkdir()
    (tree / "shut").chmod(0)
    before = snapshot(outside)
    descriptor = os.open(tree, os.O_RDONLY)
    for _ in range(3000):  # more than a path, a stack or a table of descriptors could hold
        os.mkdir("deep", dir_fd=descriptor)
        inner = os.open("deep", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    durable.remove_tree(str(tree))
    assert names(scratch) == {"outside", "outside/kept"}
    assert snapshot(outside) == before
    (scratch / "link").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        durable.remove_tree(str(scratch / "link"))
    assert snapshot(outside) == before


def test_removing_a_tree_is_durable_and_may_be_repeated(tmp_path: Path, steps: list[tuple[str, str]]) -> None:
    """The parent is flushed after the removal, also where an earlier call got as far as the removal only."""
    (tmp_path / "tree").mkdir()
    steps.clear()
    durable.remove_tree(str(tmp_path / "tree"))
    assert steps == [("rmdir", str(tmp_path / "tree")), ("fsync", str(tmp_path))]
    durable.remove_tree(str(tmp_path / "tree"))
    assert steps[2:] == [("fsync", str(tmp_path))]
    durable.remove_tree(str(tmp_path / "no/parent"))


def test_removing_a_tree_of_which_something_goes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that ends meanwhile removes its files: they are gone, as is wanted."""
    for name in ("one", "two"):
        (tmp_path / "tree/below").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree/below" / name).write_text("")
    real = os.unlink

    def unlink(path: str, *, dir_fd: int | None = None) -> None:
        real(path, dir_fd=dir_fd)
        for left in (tmp_path / "tree/below").iterdir():
            real(left)

    monkeypatch.setattr(os, "unlink", unlink)
    durable.remove_tree(str(tmp_path / "tree"))
    assert not (tmp_path / "tree").exists()


def test_removing_a_tree_stops_at_a_mount(tmp_path: Path) -> None:
    """What is mounted in a tree, be it from the same file system, keeps its content."""
    kept, point = tmp_path / "kept", tmp_path / "tree/point"
    for path in [kept, point]:
        path.mkdir(parents=True)
    (kept / "file").write_text("kept")
    script = "import sys; from limpet.engine.state.durable import remove_tree; remove_tree(sys.argv[1])"
    inside = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$5"'
    arguments = [kept, point, sys.executable, script, tmp_path / "tree"]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", inside, "sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # type: ignore[arg-type]
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr}")
    assert f"[Errno {errno.EXDEV}] something is mounted here: 'point'" in done.stderr
    assert (kept / "file").read_text() == "kept"


def test_a_file_system_is_flushed_or_an_error_is_raised(tmp_path: Path) -> None:
    """syncfs is called for a path that is there; a missing one is an OSError."""
    durable.sync_filesystem(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        durable.sync_filesystem(str(tmp_path / "none"))


def test_a_bundle_is_made_with_three_flushes_and_removed_with_none(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    """config.json, the names in the bundle, its own name. Content costs one at the removal, an image two before it."""
    bundle, path = ContainerBundle(str(tmp_path / "one"), "one", "local"), str(tmp_path / "one")

    def flushed() -> list[str]:
        found = [path.rpartition("/.tmp-")[0] or path for step, path in steps if step == "fsync"]
        steps.clear()
        return found

    bundle.begin()
    assert flushed() == []
    bundle.finish(b'{"annotations":{"kept":"yes"}}')
    assert steps[-2:] == [("fsync", path), ("fsync", str(tmp_path))]
    assert flushed() == [path, path, str(tmp_path)]
    config = json.loads(Path(path, "config.json").read_bytes())
    assert config["annotations"] == {"kept": "yes", "limpet.marker": Path(path, ".limpet.json").read_text()}
    bundle.remove()
    assert flushed() == []
    bundle.begin()
    bundle.flush_marker()
    assert flushed() == [f"{path}/.limpet.json", path]
    Path(bundle.rootfs, "file").touch()
    bundle.remove()
    assert flushed() == [path]
    assert names(tmp_path) == set()
