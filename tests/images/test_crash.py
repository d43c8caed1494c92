"""A kill at any instant: afterwards an image is whole or not there, and what was left over is cleared away."""

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from limpet.engine.images import DirectoryImageStore
from limpet.schema.image import ImageName, MountType
from tests.oci_layout import Layout, member, names, tar

LAYERS = [tar(member("lower", b"x" * 400_000)), tar(member("upper", b"y"))]
APP = ImageName("app", "1")
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "os.scandir", "os.listdir", "fcntl.flock"}
"""Python's audit events of what touches the disk; between two of them it does not change, but for one write."""
STEPS_OF_A_TURN = 200
"""About so many of them open a store, load four times and remove."""


def run_killed(work: Callable[[], None], before_kill: Callable[[int], None] = lambda pid: None) -> bool:
    """Run `work` in a fork; tell whether it came to its end rather than being killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a fork must not return into pytest
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    before_kill(pid)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def call_at_steps(call: Callable[[], object]) -> None:
    """Call `call` before each step of this process."""
    sys.addaudithook(lambda event, _: call() if event in STEPS else None)


def kill_at_step(number: int) -> None:
    """Kill this process before the step of that number."""
    steps = itertools.count(1)
    call_at_steps(lambda: next(steps) == number and os.kill(os.getpid(), signal.SIGKILL))


def require_all_or_nothing(path: Path, mounts: Path) -> bool:
    """Require that nothing is left over after an opening, and that what is checked good mounts whole."""
    store = DirectoryImageStore(str(path))
    there = store.check(APP)
    files = {name for name in names(path) if (path / name).is_file()}
    assert len(files) == (1 + 4 + 1 if there else 1), files  # lock; manifest, config, two layers; record
    assert not any(".tmp-" in name for name in files)
    if there:
        target = mounts / f"rootfs{len(list(mounts.iterdir()))}"
        target.mkdir()
        store.mount(APP, MountType.PLAIN, str(target))
        assert (target / "lower").stat().st_size == 400_000
        assert (target / "upper").read_bytes() == b"y"
    return there


def test_a_kill_at_any_step_leaves_a_whole_image_or_none(tmp_path: Path) -> None:
    """Opening, loading and removing are killed before each of their steps on disk in turn."""
    layout = Layout(tmp_path / "layout")
    layout.add_image(LAYERS)
    archive = str(layout.pack(tmp_path / "app.tar.zst"))
    (tmp_path / "mounts").mkdir()
    outcomes = []
    for number in range(1, 1000):
        path = tmp_path / f"store{number}"

        def work(number: int = number, path: Path = path) -> None:
            kill_at_step(number)
            store = DirectoryImageStore(str(path))
            store.load(archive)
            store.remove(APP)

        ended = run_killed(work)
        outcomes.append(require_all_or_nothing(path, tmp_path / "mounts"))
        if ended:
            break
    assert ended
    assert number > 60
    # not there, from some step on there, and from a later one on removed: nothing in between
    changes = [now for before, now in zip([False, *outcomes], outcomes, strict=False) if now != before]
    assert changes == [True, False]


@pytest.mark.long
def test_kills_at_random_instants_leave_a_whole_image_or_none(tmp_path: Path) -> None:
    """One store, killed again and again a moment after a step of its loading and removing, also amid writes."""
    layout = Layout(tmp_path / "layout")
    layout.add_image(LAYERS)
    (tmp_path / "mounts").mkdir()
    seeded = random.Random(1)

    def work() -> None:
        call_at_steps(lambda: os.write(writing, b"."))
        while True:
            store = DirectoryImageStore(str(tmp_path / "store"))
            for _ in range(4):
                store.load(str(layout.path))
            store.remove(APP)

    def kill(pid: int) -> None:
        os.close(writing)
        with open(reading, "rb", buffering=0) as steps:
            left = seeded.randrange(1, STEPS_OF_A_TURN)
            while left > 0:  # however busy the machine is, it gets that far
                read = len(steps.read(left))
                assert read, "it ended by itself"
                left -= read
            time.sleep(seeded.uniform(0, 0.001))  # the instant is the experiment, nothing waits for it
            os.kill(pid, signal.SIGKILL)

    outcomes = set()
    for _ in range(60):
        reading, writing = os.pipe()
        assert not run_killed(work, kill)
        outcomes.add(require_all_or_nothing(tmp_path / "store", tmp_path / "mounts"))
    assert outcomes == {True, False}


def test_a_kill_in_mount_harms_neither_the_image_nor_the_store(tmp_path: Path) -> None:
    """Half a tree in the target is the caller's to remove; the image mounts elsewhere as before."""
    layout = Layout(tmp_path / "layout")
    layout.add_image(LAYERS)
    store = DirectoryImageStore(str(tmp_path / "store"))
    store.load(str(layout.path))
    (tmp_path / "half").mkdir()
    (tmp_path / "mounts").mkdir()

    def work() -> None:
        kill_at_step(12)
        store.mount(APP, MountType.PLAIN, str(tmp_path / "half"))

    assert not run_killed(work)
    assert require_all_or_nothing(tmp_path / "store", tmp_path / "mounts")
