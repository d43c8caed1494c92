"""The runtime's own directory: one for each boot, whoever asks for it first, and never one of a copy."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from limpet.engine.starters.oci.root import RuntimeRoot, from_oci_id, remove_entry, to_oci_id
from limpet.schema.errors import InvalidInputError, StateDirectoryError

THREADS = 8


def test_those_who_come_first_at_once_get_the_same(tmp_path: Path) -> None:
    """The first containers of a state directory are started from many threads: each finds its own again."""
    with ThreadPoolExecutor(THREADS) as pool:
        for number in range(10):
            root = RuntimeRoot(str(tmp_path / str(number) / "runc"))
            barrier = threading.Barrier(THREADS)

            def make(root: RuntimeRoot = root, barrier: threading.Barrier = barrier) -> str:
                barrier.wait()
                return root.make()

            found = {task.result() for task in [pool.submit(make) for _ in range(THREADS)]}
            assert len(found) == 1
            assert os.listdir(root.above) == [os.path.basename(found.pop())]


@pytest.mark.parametrize(
    ("container_id", "oci_id"),
    [
        ("plain-1_2.3", "plain-1_2.3"),
        ("-a", "+2da"),
        (".a.-", "+2ea.-"),
        ("a+b", "a+2bb"),
        ("a/b c", "a+2fb+20c"),
        ("ü", "+c3+bc"),
        ("x" * 180, "x" * 180),
    ],
)
def test_ids_are_those_that_a_runtime_takes(container_id: str, oci_id: str) -> None:
    """And lead back to the container's."""
    assert to_oci_id(container_id) == oci_id
    assert from_oci_id(oci_id) == container_id


def test_an_id_that_grows_too_long_is_refused() -> None:
    """It has to leave room for the name of a cgroup."""
    for container_id, size in (("x" * 181, 181), ("ü" * 31, 186)):
        with pytest.raises(InvalidInputError, match=f"too long for an OCI runtime: {size} of 180 bytes"):
            to_oci_id(container_id)


def test_what_the_runtime_has_is_found(tmp_path: Path) -> None:
    """By the container's id; nothing before anything was made, nor by a copy of the directory."""
    root = RuntimeRoot(str(tmp_path / "oci" / "runc"))
    assert (root.find(), root.entries(), root.entry("a")) == ("", [], "")
    path = root.make()
    assert (root.find(), root.make(), os.path.dirname(path)) == (path, path, root.above)
    for name in ("b", "+2da"):
        os.mkdir(os.path.join(path, name))
    Path(path, "file").touch()
    assert root.entries() == RuntimeRoot(root.above).entries() == ["-a", "b", "file"]
    assert (root.entry("-a"), root.entry("c"), root.entry("file")) == (f"{path}/+2da", "", "")
    shutil.copytree(tmp_path / "oci", tmp_path / "copy")
    copy = RuntimeRoot(str(tmp_path / "copy" / "runc"))
    assert (copy.find(), copy.entries()) == ("", [])
    assert copy.make() != os.path.join(copy.above, os.path.basename(path))
    assert len(os.listdir(copy.above)) == 2


def test_what_boots_that_are_over_have_left_goes(tmp_path: Path) -> None:
    """With all that is in it; what is of this boot stays, and what is not a runtime's."""
    above = tmp_path / "runc"
    root = RuntimeRoot(str(above))
    root.remove_old()
    path = root.make()
    old = f"{'0' * 8}-{'0' * 4}-{'0' * 4}-{'0' * 4}-{'0' * 12}.1.2.3"
    for name in (old, f"{old}.4", "other", old[:-2]):
        (above / name / "in").mkdir(parents=True)
    root.remove_old()
    assert sorted(os.listdir(above)) == sorted([os.path.basename(path), f"{old}.4", "other", old[:-2]])


def test_an_entry_is_removed_if_all_in_it_is_known(tmp_path: Path) -> None:
    """What runc and crun keep; with anything else it is left whole."""
    entry = tmp_path / "a"
    entry.mkdir()
    for name in ("state.json", "status", "config.json", "exec.fifo", "more"):
        (entry / name).touch()
    assert not remove_entry(str(entry))
    assert len(os.listdir(entry)) == 5
    (entry / "more").unlink()
    assert remove_entry(str(entry))
    assert not entry.exists()


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    """By its path."""
    (tmp_path / "file").touch()
    with pytest.raises(StateDirectoryError, match=rf"^'{tmp_path}/file': (Not a directory|File exists)"):
        RuntimeRoot(str(tmp_path / "file" / "runc")).make()
