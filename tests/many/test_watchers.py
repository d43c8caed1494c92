"""Writers and watchers in processes of their own that are killed: each event once, in order, over all of them."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from limpet import Store, errors
from limpet.schema.events import Event
from tests.conftest import wait_until
from tests.records import sandbox

ROOT = Path(__file__).parents[2]
KILLS = 8
WRITER = """
import itertools, sys
from msgspec.structs import replace
from limpet import Store
from tests.records import RUNNING, metadata
with Store.open(sys.argv[1]) as store:
    for turn in itertools.count(store.revision):
        with store.transaction() as draft:
            for side in ("left", "right"):
                draft.add(metadata(f"{side}{turn}"), RUNNING)
        store.update(f"left{turn}", lambda old: replace(old, pid=old.pid + 1))
        with store.transaction() as draft:
            for side in ("left", "right"):
                draft.delete(f"{side}{turn}")
"""
WATCHER = """
import json, os, sys
from limpet import Snapshot, errors
state_dir, out = sys.argv[1:]
lines = open(out, "rb").read().splitlines()
since = json.loads(lines[-1])[0] if lines else 0
file = os.open(out, os.O_WRONLY | os.O_APPEND)
with Snapshot.open(state_dir) as snapshot:
    for event in snapshot.watch(since):
        os.write(file, json.dumps([event.revision, event.commit, event.kind, event.id]).encode() + b"\\n")
"""


def start(script: str, *args: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", script, *args], cwd=ROOT)


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL  # it had not failed before


@pytest.mark.timeout(200)
def test_kills_of_writer_and_watcher(state_dir: str, tmp_path: Path) -> None:
    """What the watchers have written down, one after the other, is the log: no event twice, and none left out."""
    chance = random.Random(7)
    out = tmp_path / "seen"
    out.touch()
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
    writer, watcher = start(WRITER, state_dir), start(WATCHER, state_dir, str(out))
    try:
        for turn in range(KILLS):
            before = out.stat().st_size
            wait_until(lambda size=before: out.stat().st_size > size, "more events")  # type: ignore[misc]
            time.sleep(chance.uniform(0.05, 0.3))
            if turn % 2:
                kill(writer)
                writer = start(WRITER, state_dir)
            else:
                kill(watcher)
                watcher = start(WATCHER, state_dir, str(out))
        before = out.stat().st_size
        wait_until(lambda: out.stat().st_size > before, "events after the last kill")
        kill(writer)
        with Store.open(state_dir) as store:
            with pytest.raises(errors.InvalidInputError):
                store.watch(store.revision + 1)
            wait_until(lambda: read(out)[-1:] == [tell(store)], "the watcher to have come to the end")
            events = [[each.revision, each.commit, each.kind.value, each.id] for each in at_hand(store)]
            there = {record.id for record in store.list()}
        kill(watcher)
    finally:
        for process in (writer, watcher):
            if process.poll() is None:
                process.kill()
                process.wait()
    seen = read(out)
    assert [each[0] for each in seen] == list(range(1, len(seen) + 1))
    assert seen[-len(events) :] == events
    told: set[str] = set()
    for _, _, kind, key in seen:
        if kind == "added":
            told.add(key)
        elif kind == "deleted":
            told.remove(key)
    assert told == there
    assert all(commit == revision or seen[revision][1] == commit for revision, commit, _, _ in seen)


def read(out: Path) -> list[list[Any]]:
    return [json.loads(line) for line in out.read_bytes().splitlines()]


def at_hand(store: Store) -> list[Event]:
    """Return what the log keeps: its newest events only, where the disk is fast."""
    try:
        watch = store.watch(0)
    except errors.CursorTooOldError as error:
        watch = store.watch(error.oldest - 1)
    with watch:
        return list(iter(lambda: watch.next(0), None))


def tell(store: Store) -> list[object]:
    with store.watch(store.revision - 1) as watch:
        event = next(watch)
    return [event.revision, event.commit, event.kind.value, event.id]
