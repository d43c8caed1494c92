"""A look that fails is no answer: where the disk refuses one, nothing is made anew, or said to be gone."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from limpet import Engine, Snapshot, Store, errors
from tests.starters.host import make

IDS = ["ended", "new", "released"]


@pytest.fixture
def used(state_dir: str) -> str:
    """Return a state directory with a container of each kind."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        for key in IDS:
            container = make(engine, key, "true")
            if key != "new":
                container.start()
                container.wait(20)
        engine.get("released").release()
    return state_dir


@contextmanager
def look_refused(number: int) -> Iterator[list[str]]:
    """Have the look with this number, from 0, fail with EIO while the block runs; yield a list of what it was at."""
    asked: list[str] = []
    refused: list[str] = []

    def refusing(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def look(path: Any, **given: Any) -> os.stat_result:
            asked.append(str(path))
            if len(asked) == number + 1:
                refused.append(str(path))
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            return real(path, **given)

        return look

    with pytest.MonkeyPatch.context() as patch:
        for name in ("stat", "lstat"):
            patch.setattr(os, name, refusing(getattr(os, name)))
        yield refused


def read_ids(opened: "Engine | Store | Snapshot") -> list[str]:
    return sorted(each.id for each in opened.list())


@pytest.mark.parametrize("opening", [Engine.open, Store.open, Snapshot.open])
def test_an_opening_that_cannot_look_loses_nothing(used: str, opening: Callable[[str], Any]) -> None:
    """Whichever look fails, it opens with all that there is, or says that the disk refuses, and opens the next time."""
    number, refused = 0, ["not yet"]
    while refused:
        with look_refused(number) as refused:
            said = ""
            try:
                with opening(used) as opened:
                    assert read_ids(opened) == IDS, refused
            except errors.LimpetError as error:
                said = f"{type(error).__name__}: {error}"
        assert not said or os.strerror(errno.EIO) in said, (refused, said)
        number += 1
    assert number > len(IDS)
    with Engine.open(used) as engine:
        assert read_ids(engine) == IDS


@pytest.mark.parametrize("forget", [lambda engine: engine.get("x").delete(), lambda engine: engine.prune()])
def test_a_bundle_that_cannot_be_looked_for_is_not_said_to_be_gone(
    state_dir: str, forget: Callable[[Engine], object]
) -> None:
    """What a release that failed has left is removed with its container, or keeps it from being deleted."""
    bundle = Path(state_dir, "containers", "x")
    number, refused = 0, ["not yet"]
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        while refused:
            make(engine, "x", "true").start()
            engine.get("x").wait(20)
            marker = (bundle / "config.json").read_bytes()
            engine.get("x").release()
            bundle.mkdir()
            (bundle / "config.json").write_bytes(marker)
            with look_refused(number) as refused, suppress(errors.LimpetError):
                forget(engine)
            assert not bundle.exists() or "x" in read_ids(engine), refused
            if "x" in read_ids(engine):
                engine.get("x").delete()
            assert not bundle.exists()
            number += 1
    assert number > 1
