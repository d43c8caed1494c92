"""The recorder and the disk model against the real file system: what is said to have happened did happen."""

import contextlib
import os
import random
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from limpet.testing import Fate, Images, Life, Model, Trace, materialise
from limpet.testing.disk import Disk, Image, Landing
from limpet.testing.operations import (
    ROOT,
    Create,
    MakeDirectory,
    Operation,
    Rename,
    Sync,
    SyncAll,
    SyncFailed,
    Truncate,
    Unlink,
    Write,
)
from limpet.testing.operations import (
    Acknowledge as Acknowledged,
)
from limpet.testing.tree import copy
from tests.workloads import Acknowledge

NAMES = st.sampled_from(["a", "b", "d/a", "d/b", "e", "d"])
CALLS = st.one_of(
    st.tuples(st.sampled_from(["write", "append", "exclusive", "overwrite"]), NAMES, st.binary(min_size=1, max_size=9)),
    st.tuples(st.sampled_from(["unlink", "mkdir", "rmdir", "fsync", "chmod", "through"]), NAMES, st.none()),
    st.tuples(st.sampled_from(["rename", "link", "symlink"]), NAMES, NAMES),
    st.tuples(st.just("truncate"), NAMES, st.integers(0, 6000)),
    st.tuples(st.just("sync"), st.none(), st.none()),
)


def _write(path: str, flags: int, data: bytes) -> None:
    descriptor = os.open(path, flags | os.O_WRONLY, 0o640)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _through(name: str) -> None:
    """Write through descriptors of the directory and of the file, past its end and in pieces."""
    directory = os.open(os.path.dirname(name) or ".", os.O_RDONLY)
    try:
        descriptor = os.open(os.path.basename(name), os.O_CREAT | os.O_RDWR, dir_fd=directory)
        try:
            os.pwrite(descriptor, b"far", 700)
            os.lseek(descriptor, 3, os.SEEK_SET)
            os.writev(descriptor, [b"two", b"parts"])
            os.pwritev(descriptor, [b"x", b"y"], 600)
            os.posix_fallocate(descriptor, 0, 1000)
        finally:
            os.close(descriptor)
    finally:
        os.close(directory)


def _fsync(name: str) -> None:
    descriptor = os.open(name, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


DO = {
    "write": lambda name, data: _write(name, os.O_CREAT | os.O_TRUNC, data),
    "append": lambda name, data: _write(name, os.O_CREAT | os.O_APPEND, data),
    "exclusive": lambda name, data: _write(name, os.O_CREAT | os.O_EXCL, data),
    "overwrite": lambda name, data: _write(name, 0, data),
    "unlink": lambda name, _: os.unlink(name),
    "mkdir": lambda name, _: os.mkdir(name, 0o750),
    "rmdir": lambda name, _: os.rmdir(name),
    "fsync": lambda name, _: _fsync(name),
    "chmod": lambda name, _: os.chmod(name, 0o700),
    "through": lambda name, _: _through(name),
    "rename": os.rename,
    "link": os.link,
    "symlink": lambda name, target: os.symlink(target, name),
    "truncate": os.truncate,
    "sync": lambda *_: os.sync(),
}


def _found(directory: str) -> dict[str, tuple[int, bytes | str | None]]:
    """The tree as it is: each path's mode and content."""
    result: dict[str, tuple[int, bytes | str | None]] = {}
    for path in Path(directory).rglob("*"):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            result[name] = (0o777, os.readlink(path))
        else:
            result[name] = (path.stat().st_mode & 0o7777, None if path.is_dir() else path.read_bytes())
    return result


def _said(image: Image) -> dict[str, tuple[int, bytes | str | None]]:
    return {file.path: (file.mode, file.content) for file in image}


def _visible(disk: Disk) -> Image:
    whole = Landing([True] * len(disk.changes), [True] * len(disk.namings))
    return disk.image(whole, random.Random(0))


@settings(max_examples=40)
@given(before=st.lists(CALLS, max_size=4), calls=st.lists(CALLS, min_size=1, max_size=14))
def test_the_model_sees_what_the_file_system_does(before: list[tuple], calls: list[tuple]) -> None:  # type: ignore[type-arg]
    """At every operation of any life the model's visible tree is the real one, and after a sync so is every image."""

    def live(directory: str, acknowledge: Acknowledge) -> None:
        for call, first, second in calls:
            with contextlib.suppress(OSError):
                DO[call](first, second)
        os.sync()

    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch, contextlib.chdir(scratch):
        os.mkdir("d")
        for call, first, second in before:
            with contextlib.suppress(OSError):
                DO[call](first, second)
        with Life(live, scratch) as life:
            disks = {model: Disk(life.trace.start, model) for model in Model}
            done = 0
            for step in life:
                step.perform()
                for disk in disks.values():
                    for operation in life.operations[done:]:
                        disk.step(operation)
                    assert _said(_visible(disk)) == _found(scratch)
                done = len(life.operations)
        assert life.status == 0, life.failure()
        for model in Model:
            ((_, image),) = Images(life.trace, model).at(len(life.operations))
            assert _said(image) == _found(scratch)
            with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
                materialise(image, f"{made}/image")
                copy(f"{made}/image", f"{made}/copy")
                assert _found(f"{made}/image") == _found(f"{made}/copy") == _said(image)


NAMED = Sync(ROOT)
FILE = (Create(1, ROOT, "f", 0o600), Write(1, 0, b"old"), Sync(1), NAMED)
NEW = (Create(2, ROOT, "t", 0o600), Write(2, 0, b"new"))
ZEROS = bytes(3)  # the size reached the disk, the data did not
REPLACE = Rename(2, ROOT, "t", ROOT, "f")
LAWS: dict[str, tuple[tuple[Operation, ...], Model, set[bytes | None]]] = {
    # after these operations, in this model: what f may hold (None: there is no f)
    "synced file, unsynced name, posix": ((*FILE[:3],), Model.POSIX, {None, b"old"}),
    "synced file, unsynced name, journaled": ((*FILE[:3],), Model.JOURNALED, {b"old"}),
    "synced name, unsynced file": ((*FILE[:2], Sync(ROOT)), Model.POSIX, {b"", ZEROS, b"old"}),
    "overwritten": ((*FILE, Write(1, 0, b"xyz")), Model.POSIX, {b"old", b"xyz"}),
    "replaced without a flush": ((*FILE, *NEW, REPLACE), Model.JOURNALED, {b"old", b"", ZEROS, b"new"}),
    "replaced after a flush": ((*FILE, *NEW, Sync(2), REPLACE), Model.POSIX, {b"old", b"new"}),
    "replaced, flushed, directory flushed": ((*FILE, *NEW, Sync(2), REPLACE, Sync(ROOT)), Model.POSIX, {b"new"}),
    "replaced and any file flushed, journaled": ((*FILE, *NEW, Sync(2), REPLACE, Sync(1)), Model.JOURNALED, {b"new"}),
    "replaced and any file flushed, posix": ((*FILE, *NEW, Sync(2), REPLACE, Sync(1)), Model.POSIX, {b"old", b"new"}),
    "removed": ((*FILE, Unlink(ROOT, "f")), Model.POSIX, {b"old", None}),
    "removed and flushed": ((*FILE, Unlink(ROOT, "f"), Sync(ROOT)), Model.POSIX, {None}),
    "cut": ((*FILE, Truncate(1, 1)), Model.JOURNALED, {b"old", b"o"}),
    "cut and everything flushed": ((*FILE, Truncate(1, 1), SyncAll()), Model.POSIX, {b"o"}),
    "moved to another directory, which was flushed": (
        (*FILE[:3], MakeDirectory(3, ROOT, "d", 0o700), Rename(1, ROOT, "f", 3, "g"), Sync(3)),
        Model.POSIX,
        {None},
    ),
    "volatile by its first name, moved to another": (
        (Create(1, ROOT, "f-shm", 0o600), Write(1, 0, b"old"), Rename(1, ROOT, "f-shm", ROOT, "f"), NAMED),
        Model.POSIX,
        {b"", ZEROS, b"old"},
    ),
    "moved away and back, and flushed": (
        (*FILE, MakeDirectory(3, ROOT, "d", 0o700), Rename(1, ROOT, "f", 3, "g"), Rename(1, 3, "g", ROOT, "f"), NAMED),
        Model.POSIX,
        {b"old"},
    ),
    "in a directory without a name": (
        (MakeDirectory(3, ROOT, "d", 0o700), Create(1, 3, "f", 0o600), Sync(1), Sync(3), Rename(1, 3, "f", ROOT, "f")),
        Model.POSIX,
        {None, b""},
    ),
}


def test_the_laws_of_the_two_models() -> None:
    """Each rule of what may and may not survive holds over all images of a cut, and every allowed outcome occurs."""
    for name, (operations, model, allowed) in LAWS.items():
        seen: set[bytes | str | None] = set()
        for seed in range(8):
            images = Images(Trace((), operations), model, seed=seed)
            for _, image in images.at(len(operations)):
                seen.add({file.path: file.content for file in image}.get("f"))
        assert seen == allowed, name


def test_torn_writes_are_torn_at_sectors() -> None:
    """A large write lands in whole sectors, each old or new, and new space that was not written reads as zeros."""
    old, new = b"o" * 2048, b"n" * 4096
    trace = Trace((Create(1, ROOT, "f", 0o600), Write(1, 0, old)), (Write(1, 0, new),))
    kinds: set[bytes] = set()
    for point, image in Images(trace, Model.POSIX, samples=20).at(1):
        content = image[0].content
        assert isinstance(content, bytes)
        sectors = [content[at : at + 512] for at in range(0, len(content), 512)]
        assert all(len(set(sector)) == 1 for sector in sectors), point
        kinds.update(sector[:1] for sector in sectors)
    assert kinds == {b"o", b"n", b"\0"}


def test_a_failed_flush_drops_pages_until_they_are_written_again() -> None:
    """A page that a failed flush dropped is in no later flush, until the next write to it brings it back whole."""
    first, second = b"1" * 4096, b"2" * 4096
    failed = (Create(1, ROOT, "f", 0o600), Write(1, 0, first), Write(1, 4096, second), SyncFailed(1), SyncAll())
    contents = {}
    for fate in Fate:
        ((_, image),) = Images(Trace((), failed), Model.POSIX, fate=fate).at(len(failed))
        contents[fate] = image[0].content
    assert contents[Fate.DROPPED] == b""
    assert contents[Fate.LANDED] == first + second
    again = (*failed, Write(1, 10, b"x"), SyncAll())
    ((_, image),) = Images(Trace((), again), Model.POSIX).at(len(again))
    assert image[0].content == b"1" * 10 + b"x" + b"1" * 4085


def test_acknowledgements_are_those_before_the_cut() -> None:
    """The same disk is another image once more was acknowledged, for then more must be on it."""
    trace = Trace((), (*FILE, Acknowledged(b"1"), Acknowledged(b"2")))
    images = Images(trace, Model.POSIX)
    assert [len(list(images.at(cut))) for cut in (4, 5, 6, 6)] == [1, 1, 1, 0]


def test_what_is_cut_off_after_a_failed_flush_does_not_come_back() -> None:
    """A file that is emptied and written anew, the cure for a failed flush, holds what is new and nothing else."""
    failed = (Create(1, ROOT, "f", 0o600), Write(1, 0, b"o" * 5000), SyncFailed(1))
    for size, kept in ((0, b""), (2, b"oo"), (4098, b"o" * 4098)):
        operations = (*failed, Truncate(1, size), Write(1, size, b"new"), Write(1, 0, kept[:1]), SyncAll())
        ((_, image),) = Images(Trace((), operations), Model.POSIX).at(len(operations))
        assert image[0].content == kept + b"new"


def test_any_names_may_be_missing_by_the_letter() -> None:
    """Where only names are pending, some of which land and others do not, every combination is tried in the end."""
    start = [(Create(node, ROOT, f"old{node}", 0o600)) for node in range(1, 5)]
    renames = [Rename(node, ROOT, f"old{node}", ROOT, f"new{node}") for node in range(1, 5)]
    images = Images(Trace(tuple(start), tuple(renames)), Model.POSIX, samples=200)
    assert len({tuple(sorted(file.path for file in image)) for _, image in images.at(4)}) == 2**4


def test_a_directory_is_never_in_itself() -> None:
    """Renames of directories that land in any combination leave a tree, each directory in one place."""
    start = (MakeDirectory(1, ROOT, "A", 0o700), MakeDirectory(2, ROOT, "B", 0o700))
    renames = (
        Rename(1, ROOT, "A", ROOT, "X"),
        Rename(2, ROOT, "B", 1, "B"),
        Rename(2, 1, "B", ROOT, "B"),
        Rename(1, ROOT, "X", 2, "X"),
    )
    for _, image in Images(Trace(start, renames), Model.POSIX, samples=200).at(4):
        assert len(image) <= 2, image
