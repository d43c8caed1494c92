"""Readers beside writers that come, write without a pause and are killed: each look is whole, and none goes back."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine import Store
from tests.conftest import wait_until
from tests.records import RUNNING, metadata, sandbox

ROOT = Path(__file__).parents[2]
WAL_BYTES = 1 << 18
TURNS = 1200
KILLS = 5
LIVING = 50
PRELUDE = """
import os, struct, sys
from msgspec.structs import replace
from tests.records import RUNNING, metadata
state_dir, counter_path = sys.argv[1:]
counter = os.open(counter_path, os.O_RDWR)
def acknowledged(): return struct.unpack("Q", os.pread(counter, 8, 0))[0]
"""
WRITER = f"""
from limpet.engine.database.sqlite import connection as sqlite, event_log, writer
event_log.KEPT_EVENTS = 100  # the log is as long after a short stream as after a long one
writer.WAL_BYTES = {WAL_BYTES}  # so that a short stream begins the WAL anew as often as a long one
sqlite._READERS_TIMEOUT_SECONDS = 30  # a busy machine is no reason to let it grow
from limpet.engine import Store
with Store.open(state_dir) as store:
    turn = next(one.record.status.pid for one in store.unsettled() if one.record.id == "left")
    while True:
        turn += 1
        with store.transaction() as draft:
            for name in ("left", "right"):
                draft.update(name, lambda old: replace(old, pid=turn))
            draft.add(metadata(f"job{{turn:08}}"), replace(RUNNING, pid=0, finished_at=3, exit_code=turn % 256))
            if turn > {LIVING}:
                draft.delete(f"job{{turn - {LIVING}:08}}")
        os.pwrite(counter, struct.pack("Q", turn), 0)
"""
READER = f"""
from limpet.engine.inspection.snapshot import Snapshot
last = 0
while True:
    floor = acknowledged()
    with Snapshot.open(state_dir) as look:
        found = {{one.record.id: one.record.status for one in look.checkpoints()}}
        turn = found["left"].pid
        assert turn == found["right"].pid, "half a transaction"
        assert turn >= floor, f"{{turn}} seen, {{floor}} had been acknowledged before"
        assert turn >= last, f"{{turn}} seen after {{last}}"
        jobs = sorted(key for key in found if key.startswith("job"))
        assert jobs == [f"job{{number:08}}" for number in range(max(turn - {LIVING}, 0) + 1, turn + 1)], (turn, jobs)
        assert all(found[key].exit_code == int(key[3:]) % 256 for key in jobs)
    last = turn
    os.write(1, b".")
"""


@pytest.mark.long
@pytest.mark.timeout(240)
def test_readers_beside_a_long_stream(state_dir: str, tmp_path: Path) -> None:
    """A thousand lives and six writers later every look was true, and the files are as small as what lives."""
    counter = tmp_path / "acknowledged"
    counter.write_bytes(bytes(8))
    with Store.open(state_dir) as store:
        store.add_sandbox(sandbox())
        for name in ("left", "right"):
            store.add(metadata(name), replace(RUNNING, pid=0))

    def start(script: str, name: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", PRELUDE + script, state_dir, str(counter)]
        with open(tmp_path / f"{name}.out", "ab") as out, open(tmp_path / f"{name}.err", "ab") as err:
            return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)

    def turn() -> int:
        (number,) = struct.unpack("Q", counter.read_bytes())
        return number  # type: ignore[no-any-return]

    def looks(name: str) -> int:
        return (tmp_path / f"{name}.out").stat().st_size

    readers = {name: start(READER, name) for name in ("one", "other")}
    sizes = []
    try:
        for number in range(1, KILLS + 2):
            writer = start(WRITER, "writer")
            try:
                while writer.poll() is None and (seen := turn()) <= number * TURNS // KILLS:
                    wait_until(lambda seen=seen: writer.poll() is not None or turn() > seen, f"turn {seen + 1}")  # type: ignore[misc] # bound at once
                sizes.append(os.stat(f"{state_dir}/store.db-wal").st_size)
                assert _look_from_outside(state_dir) == 2 + LIVING
            finally:
                writer.send_signal(signal.SIGKILL)
                writer.wait()
            assert (tmp_path / "writer.err").read_text() == ""
        before = {name: looks(name) for name in readers}
        wait_until(
            lambda: all(reader.poll() is not None or looks(name) > before[name] for name, reader in readers.items()),
            "a look after the last writer",
        )
    finally:
        for reader in readers.values():
            reader.kill()
            reader.wait()
    for name in readers:
        assert (tmp_path / f"{name}.err").read_text() == ""
        assert looks(name) > KILLS
    assert max(sizes) < 3 * WAL_BYTES
    assert os.stat(f"{state_dir}/store.db").st_size < WAL_BYTES
    with Store.open(state_dir) as store:
        assert turn() <= store.status("left").pid <= turn() + 1
        assert len(store) == 2 + LIVING


def _look_from_outside(state_dir: str) -> int:
    """Return how many containers the command line tells of."""
    command = [sys.executable, "-m", "limpet", "--state-dir", state_dir, "ps", "--all", "-o", "json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return len(json.loads(result.stdout)["containers"])
