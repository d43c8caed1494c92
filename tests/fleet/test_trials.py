"""Whatever is cut, killed or crashes while a node sends: nothing acknowledged is missing, and nothing is wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from limpet.engine.drill.fleet_proxy import Piece, Way
from limpet.engine.drill.fleet_trial import find_commits
from tests.campaigns.sizes import Size
from tests.conftest import require_tools, wait_until
from tests.fleet.conftest import Base

ROOT = Path(__file__).parents[2]
PARTS = 2
"""The campaign is tried in so many processes, side by side where there are cores."""


def run_trials(*arguments: str) -> dict[str, Any]:
    require_tools("postgres", "initdb", "setpriv")
    command = [sys.executable, "-m", "tests.fleet.trials", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert result.stdout, result.stderr[-4000:]
    told: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return told


def test_commits_are_those_that_write() -> None:
    """A transaction that only reads is hit as seldom as anything else; a batch in one statement ends with it."""
    said: list[tuple[Way, bytes, bool]] = [
        *(("up", b"BEGIN", False), ("down", b"BEGIN", False), ("up", b"FETCH 1", False), ("down", b"1", False)),
        *(("up", b"COMMIT", False), ("down", b"COMMIT", False)),
        *(("up", b"BEGIN", False), ("up", b"\nINSERT INTO fleet_node AS old", False), ("down", b"1", False)),
        *(("up", b"COMMIT", True), ("down", b"COMMIT", True)),
        *(("up", b"SELECT", False), ("down", b"1", False), ("up", b"\nWITH begun AS (", True), ("down", b"1", True)),
        *(("up", b"BEGIN", False), ("up", b"\nWITH begun AS (", False), ("up", b"DELETE", False)),
        *(("down", b"1", False), ("up", b"COMMIT", True), ("up", b"S", False), ("down", b"COMMIT", True)),
    ]
    pieces = [(Piece(way, number, data), is_commit) for number, (way, data, is_commit) in enumerate(said)]
    assert find_commits([piece for piece, _ in pieces]) == [piece for piece, is_commit in pieces if is_commit]


@pytest.mark.campaign("fleet")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_blows_while_sending(size: Size, part: int) -> None:
    """At points drawn from all over a short life, and what the trials have made in the database is gone afterwards."""
    told = run_trials("--points", str(size.least // PARTS), "--seed", str(1 + part))
    assert told["findings"] == []
    assert told["points"] >= size.least // PARTS
    assert told["acknowledged"] >= told["points"]
    assert told["schemas"] == []


@pytest.mark.long
@pytest.mark.timeout(300)
def test_postgresql_is_lost_while_sending() -> None:
    """It is killed amid what a node sends, or its standby takes its place, again and again."""
    told = run_trials("--points", "6", "--action", "crash", "--action", "promote", "--seed", "3")
    assert told["findings"] == []
    assert told["kinds"].keys() == {"crash", "promote"}
    lagging = ("--point", "promote:up:60:100:sync", "--point", "promote:down:60:100:async")
    told = run_trials(*lagging)
    assert (told["findings"], told["points"]) == ([], 2)


@pytest.mark.long
@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGKILL])
def test_postgresql_ends_with_who_started_it(blow: signal.Signals) -> None:
    """However that ends: nobody would stop it."""
    require_tools("postgres", "initdb", "setpriv")
    with TemporaryDirectory(prefix="limpet-pg-", dir="/tmp") as directory:
        code = f"from tests.fleet.conftest import Cluster; Cluster({directory!r}); print(flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as starter:
            assert starter.stdout is not None
            assert starter.stdout.readline()
            (server,) = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
            starter.send_signal(blow)
        wait_until(lambda: not os.path.exists(f"/proc/{server}"), "PostgreSQL to end")
        os.unlink(f"{directory}.log")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("control", range(5))
def test_the_trials_have_teeth(control: int) -> None:
    """Nodes that acknowledge early, ignore who has taken over, write late rows over newer ones, wait for no disk of
    PostgreSQL's, or for no standby, are noticed.
    """
    (noticed,) = run_trials("--control", str(control))["noticed"].values()
    assert noticed


@pytest.mark.long
@pytest.mark.timeout(300)
def test_kills_at_the_nodes_own_writes() -> None:
    """In both modes, before, amid and after one in 24 calls that change a file; who acknowledges early is noticed."""
    told = run_trials("--calls", "24")
    assert told["findings"] == []
    assert told["points"] >= 30
    assert told["acknowledged"] >= told["points"]
    assert run_trials("--calls", "40", "--control", "0")["lost"]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_drill_of_a_users_database(base: Base) -> None:
    """`limpet drill --mode fleet` is clean, catches its controls, and leaves nothing there but what was."""
    base.ask("CREATE TABLE theirs (a int)")
    less = "from limpet.engine.drill import modes; modes._FLEET_POINTS = 8; modes._FLEET_KILLS_EVERY = 200"
    code = f"{less}; from limpet.engine.cli import main; main()"
    command = [sys.executable, "-c", code, "drill", "--mode", "fleet", "--seed", "2", "-o", "json"]
    environment = {"PATH": os.environ["PATH"], "LIMPET_FLEET": base.url}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    report = json.loads(result.stdout)
    assert (result.returncode, report["findings"]) == (0, [])
    assert report["points"] >= 8 + 2, "kills at the node's own writes, in both modes, too"
    assert report["control"]["fleet"]["violations"] >= 3
    assert base.url not in result.stdout
    assert base.ask(
        "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT LIKE 'pg%%' AND tablename <> ''"
        " AND schemaname <> 'information_schema'"
    ) == [("public", "theirs")]
