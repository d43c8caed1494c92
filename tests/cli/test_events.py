"""`limpet events`: the log of changes beside a live engine, after its death, and while it goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet import Store
from tests.cli.conftest import Limpet
from tests.conftest import wait_until
from tests.records import RUNNING, metadata, sandbox

ENDED = replace(RUNNING, pid=0, finished_at=9, exit_code=3, reason="Error")


@pytest.fixture
def filled(state_dir: str) -> Store:
    """A store with a life in it: seven events."""
    store = Store.open(state_dir)
    store.add_sandbox(sandbox())
    store.add_sandbox(sandbox("t"))
    store.add(metadata("web", tier="front"), RUNNING)
    store.add(metadata("db", "t"), RUNNING)
    store.checkpoint("web", ENDED)
    store.delete("web")
    store.put("lease", "key", 1)
    return store


def lines(limpet: Limpet, *args: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in limpet.ok("events", *args, "-o", "json").splitlines()]


def test_filters_and_beginnings(limpet: Limpet, filled: Store) -> None:
    """Beside a live store and after it: all that is kept, or what is asked for, as JSON lines and as a table."""
    for _ in range(2):
        assert [one["revision"] for one in lines(limpet)] == [1, 2, 3, 4, 5, 6, 7]
        for args, wanted in (
            (("--since", "5"), [6, 7]),
            (("--since", "10m"), [1, 2, 3, 4, 5, 6, 7]),
            (("--since", "0s"), []),
            (("--id", "w"), [3, 5, 6]),
            (("--name", "db"), [4]),
            (("--sandbox", "t"), [2, 4]),
            (("--label", "tier=front"), [3, 5, 6]),
            (("--kind", "added", "--kind", "item-put"), [3, 4, 7]),
        ):
            assert [one["revision"] for one in lines(limpet, *args)] == wanted, args
        ended = lines(limpet, "--kind", "state")[0]
        assert (ended["state"], ended["exit_code"], ended["commit"], ended["version"]) == ("EXITED", 3, 5, 4)
        assert "EXITED   Error (3)" in limpet.ok("events")
        filled.close()


def test_what_is_refused(limpet: Limpet, filled: Store) -> None:
    """A beginning that is none, or is to come, is refused with the status of wrong usage."""
    filled.close()
    for since in ("8", "-1", "soon", "1w", "9" * 30):
        assert limpet("events", "--since", since).returncode == 2, since
    assert limpet("events", "--kind", "unheard").returncode == 2


def test_following(limpet: Limpet, filled: Store, tmp_path: Path) -> None:
    """With --follow each event is printed as it happens, also those of the next engine; Ctrl-C ends it."""
    out = tmp_path / "out"
    with open(out, "wb") as file:
        command = [sys.executable, "-m", "limpet", "-s", limpet.state_dir, "events", "-f", "--since", "6", "-o", "json"]
        following = subprocess.Popen(command, stdout=file, env=os.environ | {"PYTHONUNBUFFERED": ""})
    try:
        wait_until(lambda: out.read_bytes().count(b"\n") == 1, "what was before")
        filled.add(metadata("late"))
        wait_until(lambda: out.read_bytes().count(b"\n") == 2, "what happens")
        filled.close()
        with Store.open(limpet.state_dir) as again:
            again.delete("late")
        wait_until(lambda: out.read_bytes().count(b"\n") == 3, "what the next one does")
        following.send_signal(2)
        assert following.wait(30) == 130
    finally:
        if following.poll() is None:
            following.kill()
            following.wait()
    assert [json.loads(line)["revision"] for line in out.read_bytes().splitlines()] == [7, 8, 9]
    (added,) = (line for line in limpet.ok("events", "--since", "7").splitlines() if " added " in line)
    assert added.split()[-1] == "NEW"  # what was written down is not in doubt
