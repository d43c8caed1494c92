"""A full disk, or somebody who cuts the -shm file, ends no program that has a store open: it gets an error, or none."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet import Engine, Snapshot, Store, errors
from limpet.engine.database.sqlite import shared_memory
from tests.records import sandbox

OPEN_AND_ADD = """
import sys
from limpet import Store, errors
from tests.records import sandbox
try:
    with Store.open(sys.argv[1]) as store:
        store.add_sandbox(sandbox(sys.argv[2]))
    print("added")
except errors.DiskFullError as error:
    print(error)
except errors.LimpetError as error:
    print(type(error).__name__, error)
"""
CHANGE_AND_CLOSE = """
import sys
from msgspec.structs import replace
from limpet import Store, errors
from tests.records import sandbox
def change(store):
    store.update_sandbox("s", lambda old: replace(old, extra={"n": old.extra.get("n", 0) + 1}))
store = Store.open(sys.argv[1])
store.add_sandbox(sandbox())
print("open", flush=True)
sys.stdin.readline()
for call in (lambda: change(store), store.close):
    try:
        call()
    except errors.LimpetError as error:
        print(type(error).__name__, error, flush=True)
sys.stdin.readline()
with Store.open(sys.argv[1]) as store:
    change(store)
    print(store.sandbox_status("s").extra["n"], flush=True)
"""


@pytest.fixture
def small_blocks(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB whose blocks are a quarter of a page, as mkfs makes small ones."""
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(24 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-b", "1024", "-m", "0", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no file system can be made and mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(ballast: Path, left_kib: int) -> None:
    """Leave so much room on the disk."""
    with ballast.open("wb") as file, pytest.raises(OSError, match="No space") as raised:
        while True:
            os.write(file.fileno(), bytes(1024))
    assert raised.value.errno == errno.ENOSPC
    os.truncate(ballast, ballast.stat().st_size - left_kib * 1024)
    os.sync()


def test_opening_on_a_disk_that_is_nearly_full_ends_nobody(small_blocks: Path) -> None:
    """However little room is left: an error says that the disk is full, and once there is room, all is as before."""
    state, ballast = str(small_blocks / "state"), small_blocks / "ballast"
    with Store.open(state) as store:
        store.add_sandbox(sandbox("kept"))
    added = {"kept"}
    for left in range(0, 80, 8):
        fill(ballast, left)
        command = [sys.executable, "-c", OPEN_AND_ADD, state, f"s{left}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (left, signal.Signals(-done.returncode))
        assert done.stdout == "added\n" or "space" in done.stdout, (left, done.stdout)
        added |= {f"s{left}"} if done.stdout == "added\n" else set()
        ballast.unlink()
    with Store.open(state) as store:
        assert added <= set(store.sandbox_ids)


def test_room_is_set_aside_while_there_is_some(small_blocks: Path) -> None:
    """On a disk that is full by now, what is there is read, beside the store too; what is written fails, or works."""
    state, ballast = str(small_blocks / "state"), small_blocks / "ballast"
    with Store.open(state) as store:
        store.add_sandbox(sandbox())
        shared = os.stat(f"{state}/store.db-shm")
        assert shared.st_blocks * 512 >= shared.st_size
        fill(ballast, 0)
        with pytest.raises(errors.DiskFullError):
            for number in range(10_000):
                store.update_sandbox("s", lambda old, n=number: replace(old, extra={"n": n, "x": "x" * 4000}))  # type: ignore[misc]
        with Snapshot.open(state) as snapshot:
            assert list(snapshot.sandbox_statuses()) == ["s"]
        ballast.unlink()
        store.update_sandbox("s", lambda old: replace(old, extra={"n": -1}))


@pytest.mark.parametrize("size", [0, 3, 100, 4096, 20_000, 32_768])
def test_a_file_that_is_cut_is_made_anew(state_dir: str, size: int) -> None:
    """Whatever is left of it: what was written before is there, in each connection, and so is what is written after."""
    shared = f"{state_dir}/store.db-shm"
    with Engine.open(state_dir) as engine:
        pod = engine.create_sandbox({"metadata": {"name": "pod"}}, extra={"n": 0})
        with Snapshot.open(state_dir) as beside:
            for number in range(1, 5):
                os.truncate(shared, size)
                if number % 2:  # who reads first finds it so, or who writes
                    found = beside.source.ask(lambda reader: reader.load_sandbox_statuses())
                    assert f'"n":{number - 1}' in str(found[0].extra).replace(" ", "")
                pod.update(lambda old, n=number: replace(old, extra={"n": n}))  # type: ignore[misc]
                found = beside.source.ask(lambda reader: reader.load_sandbox_statuses())
                assert f'"n":{number}' in str(found[0].extra).replace(" ", "")
                assert engine.store.find("kind", "key") is None
        os.truncate(shared, size)
    with Store.open(state_dir) as store:
        assert store.sandbox_status(pod.id).extra == {"n": 4}


def test_a_cut_file_is_made_anew_where_no_room_can_be_set_aside(
    state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system, or with a C library, that has no fallocate(2): SQLite's own writes take the room."""
    monkeypatch.setattr(shared_memory, "_fallocate", None)
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        assert os.path.getsize(f"{state_dir}/store.db-shm") == 32_768
        os.truncate(f"{state_dir}/store.db-shm", 4096)
        assert store.update_sandbox("s", lambda old: replace(old, extra={"n": 1})).extra == {"n": 1}
    with Store.open(state_dir) as again:
        assert again.sandbox_status("s").extra == {"n": 1}


def test_a_file_that_is_cut_while_the_disk_is_full_is_an_error(small_blocks: Path) -> None:
    """It cannot be made anew then: nothing is touched, also not to close it; once there is room, it can be opened."""
    state, ballast = str(small_blocks / "state"), small_blocks / "ballast"
    with subprocess.Popen(
        [sys.executable, "-c", CHANGE_AND_CLOSE, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        os.truncate(f"{state}/store.db-shm", 0)
        fill(ballast, 0)
        process.stdin.write("\n")
        process.stdin.flush()
        told = [process.stdout.readline() for _ in range(2)]
        ballast.unlink()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "1\n"
        assert process.wait(30) == 0
    assert [line.partition("/")[0] for line in told] == ["DiskFullError ", "DiskFullError "]
    assert all("store.db-shm: the disk has no room for it; free some space" in line for line in told)
    with Store.open(state) as again:
        assert again.sandbox_status("s").extra == {"n": 1}


def test_it_is_cut_amid_reads_and_writes(state_dir: str) -> None:
    """Many times, between what threads read and write: no step fails, and nothing that was acknowledged is missed."""
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        problems: list[BaseException] = []
        turn = threading.Lock()  # what is cut amid a step ends the program: nothing can help that

        def work(first: int) -> None:
            try:
                for number in range(first, first + 40):
                    with turn:
                        store.put("kind", f"k{number}", number)
                    with turn:
                        assert store.find("kind", f"k{number}") is not None
            except BaseException as error:  # noqa: BLE001
                problems.append(error)

        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1000)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            with turn:
                os.truncate(f"{state_dir}/store.db-shm", 4096)
        for thread in threads:
            thread.join()
        assert problems == []
        assert len(store.list_items("kind")) == 80
