"""What `limpet` says of containers is true: beside a live engine, after its death, and after a recovery."""

import json
import os
import re
import signal
import sqlite3
from pathlib import Path

import pytest
from msgspec.structs import replace

from limpet.engine import Engine, Store
from limpet.engine.inspection.snapshot import Snapshot
from limpet.recovery.host import identify, open_pidfd
from limpet.schema.status import ContainerState
from tests.cli.conftest import Jobs, Limpet, photograph
from tests.conftest import is_running, wait_until

READS = (
    ("ps", "-a"),
    ("inspect", "alive", "ended"),
    ("history", "ended"),
    ("check",),
    ("recover", "--dry-run"),
)


def states(limpet: Limpet) -> dict[str, str]:
    return {one["name"]: one["state"] for one in limpet.json("ps", "-a")["containers"]}


def test_ps_beside_a_live_engine(limpet: Limpet, jobs: Jobs) -> None:
    """Beside a live engine ps shows what the engine knows, and takes nothing from it."""
    expected = {"alive": "RUNNING", "dying": "RUNNING", "new": "CREATED", "ended": "EXITED"}
    assert states(limpet) == expected
    assert limpet.ok("ps", "-q").split() == ["alive", "dying", "new"]
    assert limpet.json("recover")["report"]["totals"]["RUNNING"] == 2  # the live engine does it
    os.killpg(jobs.dying_pid, signal.SIGKILL)
    wait_until(lambda: states(limpet)["dying"] == "EXITED", "the engine to write the end down")
    assert limpet.json("inspect", "dying")["inspected"][0]["status"]["exit_code"] == 128 + signal.SIGKILL


def test_a_dead_process_is_never_called_running(limpet: Limpet, jobs: Jobs) -> None:
    """After a crash RUNNING is said only of what lives; what ended unseen is UNKNOWN until recover says more."""
    jobs.kill_engine_then_one()
    found = {one["name"]: one for one in limpet.json("ps", "-a")["containers"]}
    assert (found["alive"]["state"], found["alive"]["verified"]) == ("RUNNING", True)
    dying = found["dying"]
    assert (dying["state"], dying["verified"], dying["checkpoint"]) == ("UNKNOWN", False, "RUNNING")
    assert (dying["pid"], dying["exit_code"]) == (None, None)
    assert dying["message"] == "not verified; run limpet recover (its process has ended)"
    assert re.search(r"dying +0 +\S+ +UNKNOWN .* not verified; run limpet recover", limpet.ok("ps"))

    planned = limpet.json("recover", "--dry-run")["report"]
    assert planned["dry_run"] is True
    assert {one["id"]: one["state"] for one in planned["findings"]} == {
        "alive": "RUNNING",
        "dying": "EXITED",
        "new": "CREATED",
    }
    assert states(limpet)["dying"] == "UNKNOWN"

    done = limpet.json("recover")["report"]
    assert {one["id"]: one["state"] for one in done["findings"]} == {
        one["id"]: one["state"] for one in planned["findings"]
    }
    assert done["dry_run"] is False
    assert states(limpet) == {"alive": "RUNNING", "dying": "EXITED", "new": "CREATED", "ended": "EXITED"}
    # The kernel may have kept the code, where nobody has reaped it.
    assert limpet.json("history", "dying")["transitions"][-1]["exit_code"] in {255, 128 + signal.SIGKILL}


def test_a_stranger_is_not_running(limpet: Limpet, jobs: Jobs, state_dir: str) -> None:
    """A process that has a container's pid, and is another one, does not make the container RUNNING."""
    jobs.engine.kill()
    with Store.open(state_dir) as store, open_pidfd(os.getpid()) as pidfd:
        stranger = replace(identify(os.getpid(), pidfd), pidfd_inode=1, start_ticks=1)
        store.update("new", lambda old: replace(old, started_at=1, pid=stranger.pid, identity=stranger))
    assert states(limpet)["new"] == "UNKNOWN"
    assert limpet.json("inspect", "new")["inspected"][0]["verification"]["rule"] == "pid-reused"


@pytest.mark.parametrize("living", [True, False], ids=["beside an engine", "after a crash"])
def test_reading_writes_nothing(limpet: Limpet, jobs: Jobs, state_dir: str, living: bool) -> None:
    """ps, inspect, history, check and recover --dry-run leave every file as it was, the WAL included."""
    if not living:
        jobs.kill_engine_then_one()
        (Path(state_dir) / "containers" / "stray").mkdir(mode=0o700)
    journal = Path(state_dir) / "keeper" / "journal"
    last = b'"ended","forgotten"' if living else b'"dying","end"'
    wait_until(lambda: last in journal.read_bytes(), "the keeper's last record")
    before = photograph(state_dir)
    for args in READS:
        limpet(*args)
    assert photograph(state_dir) == before


def test_reading_a_closed_state_makes_no_file(limpet: Limpet, state_dir: str) -> None:
    """Where no engine runs and none crashed, not even SQLite's own files appear."""
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
        for name in ("alive", "ended"):
            config = {"metadata": {"name": name}, "image": {"image": "host"}, "command": ["true"]}
            engine.create_container(config, sandbox.id, id=name)
    before = photograph(state_dir)
    assert not [path for path in before if path.endswith("-wal")]
    for args in READS:
        limpet.ok(*args)
    limpet.ok("backup", f"{state_dir}.db")
    assert photograph(state_dir) == before
    assert not os.path.exists(os.path.join(state_dir, "store.db-shm"))


def test_an_engine_that_opens_meanwhile_is_noticed(state_dir: str) -> None:
    """A snapshot of a state that nobody had open reads on correctly when an engine opens and writes."""
    with Engine.open(state_dir) as engine:
        sandbox = engine.create_sandbox({"metadata": {"name": "jobs"}})
    with Snapshot.open(state_dir) as snapshot:
        assert snapshot.source.ask(lambda reader: len(reader.load_sandboxes())) == 1
        with Engine.open(state_dir) as engine:
            engine.create_sandbox({"metadata": {"name": "more"}})
            assert snapshot.source.ask(lambda reader: len(reader.load_sandboxes())) == 2
            assert snapshot.sandbox(sandbox.id).name == "jobs"


def test_filters(limpet: Limpet, jobs: Jobs) -> None:
    """Each filter of ps keeps what it says, and all of them must match."""
    cases = {
        (): {"alive", "dying", "new"},
        ("-a",): {"alive", "dying", "new", "ended"},
        ("al",): {"alive"},
        ("--name", "new"): {"new"},
        ("--label", "app=dying"): {"dying"},
        ("--label", "app=dying", "--label", "app=x"): set(),
        ("--state", "created"): {"new"},
        ("--state", "exited"): {"ended"},
        ("--sandbox", jobs.sandbox_id[:12], "--state", "RUNNING"): {"alive", "dying"},
        ("--sandbox", "nowhere"): set(),
    }
    assert {case: set(limpet.ok("ps", "-q", *case).split()) for case in cases} == cases


def test_a_damaged_record_hides_no_other(limpet: Limpet, jobs: Jobs, state_dir: str) -> None:
    """A record that fails its checksum is UNKNOWN, check finds it, and the others are shown as ever."""
    jobs.engine.kill()
    connection = sqlite3.connect(os.path.join(state_dir, "store.db"))
    connection.execute("UPDATE container_status SET exit_code = 0 WHERE id = 'ended'")
    connection.execute("UPDATE container SET config = '{}' WHERE id = 'new'")
    connection.execute("UPDATE sandbox SET name = 'other'")
    connection.commit()
    connection.close()
    Path(state_dir, "owner.json").unlink()
    assert states(limpet) == {
        "alive": "RUNNING",
        "dying": "RUNNING",
        "new": "CREATED",
        "ended": "UNKNOWN",
    }
    (ended,) = limpet.json("inspect", "ended")["inspected"]
    assert "checksum" in ended["damage"]
    (new,) = limpet.json("inspect", "new")["inspected"]
    assert (new["metadata"], new["cri_status"]) == (None, None)
    assert "checksum" in limpet.ok("inspect", "new")
    problems = limpet.json("check", status=6)["check"]["problems"]
    assert {problem["message"].split(":")[0].split()[0] for problem in problems} == {
        "sandbox",
        "container",
        "container_status",
    }
    assert limpet("inspect", jobs.sandbox_id).returncode == 6


def test_the_documents_keep_their_form(limpet: Limpet, jobs: Jobs) -> None:
    """The keys of every JSON document are those that schema_version 1 promises."""
    Path(limpet.state_dir, "containers", "stray").mkdir()
    documents = {args[0]: limpet.json(*args) for args in READS if args != ("check",)}
    documents["check"] = limpet.json("check", status=7)
    documents["inspect"] = limpet.json("inspect", "alive", "new", "ended", jobs.sandbox_id)
    for line in ("pods", "images", "info", "top", "stop ended", "wait ended", "prune --dry-run", "rm ended"):
        documents[line.split()[0]] = limpet.json(*line.split())
    documents["run"] = json.loads(limpet.ok("run", "-d", "-o", "json", "host", "true"))
    documents["backup"] = limpet.json("backup", f"{limpet.state_dir}.db")
    assert {document["schema_version"] for document in documents.values()} == {1}
    golden = json.loads(Path(__file__).with_name("documents.json").read_text())
    assert {name: shape(document) for name, document in documents.items()} == golden


def shape(value: object) -> object:
    """Return the keys of a document, without what is free in it; of a list, each form once."""
    if isinstance(value, dict):
        free = {"labels", "config", "identity", "cri_status", "checked", "image_manifest", "unapplied"} | {
            "extra",
            "namespaces",
        }
        return {key: None if key in free else shape(one) for key, one in sorted(value.items())}
    if isinstance(value, list):
        shapes = [shape(one) for one in value]
        return [one for index, one in enumerate(shapes) if one not in shapes[:index]]
    return None


def test_times_are_rfc3339(limpet: Limpet, jobs: Jobs) -> None:
    """Times in JSON are RFC 3339 in UTC, and null where there is none yet."""
    (ended,) = limpet.json("ps", "--state", "exited")["containers"]
    for name in ("created_at", "started_at", "finished_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", ended[name])
    (new,) = limpet.json("ps", "new")["containers"]
    assert (new["started_at"], new["finished_at"], new["exit_code"]) == (None, None, None)


def test_backup_is_a_state_of_its_own(limpet: Limpet, jobs: Jobs, tmp_path: Path) -> None:
    """A backup that was made beside a live engine opens as a state, and an existing file is never overwritten."""
    target = tmp_path / "copy" / "store.db"
    target.parent.mkdir(mode=0o700)
    limpet.ok("backup", str(target))
    again = limpet("backup", str(target))
    assert again.returncode == 4
    assert "exists already" in again.stderr
    assert states(Limpet(str(target.parent))).keys() == states(limpet).keys()


def test_verification_in_the_library(state_dir: str, jobs: Jobs) -> None:
    """A program gets from Snapshot what the command line shows."""
    jobs.kill_engine_then_one()
    with Snapshot.open(state_dir) as snapshot:
        assert snapshot.holder is None
        (view,) = snapshot.list(state=ContainerState.UNKNOWN)
        assert view.id == "dying"
        assert view.checkpoint.state is ContainerState.RUNNING
        assert view.verdict is not None
        assert view.verdict.rule in {"exit-unseen", "exit-observed"}
        assert is_running(snapshot.get("alive").status.pid)
