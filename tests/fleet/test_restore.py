"""A lost node comes back from the fleet alone, knows what it does not know, and whoever it was before is fenced."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from importlib import import_module

import psycopg
import pytest
from msgspec.structs import replace

from limpet import Engine, Snapshot, Store, errors
from limpet.engine.fleet import Fleet, batch, restore
from limpet.engine.fleet.address import Address
from limpet.engine.state.identity import read_identity
from limpet.schema.identity import ProcessIdentity
from limpet.schema.status import ContainerState, Reason, end
from tests.conftest import wait_until
from tests.fleet.conftest import Base
from tests.fleet.test_shipping import fleet_rows, local_rows, wait_sent, with_extra
from tests.fleet.test_view import silence
from tests.records import RUNNING, metadata, sandbox

ELSEWHERE = ProcessIdentity(pid=7, start_ticks=1, boot_id="of another machine", pidfd_inode=0, pid_namespace=0)


def wait_for_trouble(store: Store) -> str:
    wait_until(lambda: store.fleet_lag and store.fleet_lag.error, "the trouble to be told")
    assert store.fleet_lag is not None
    return store.fleet_lag.error


def fail(*_: object) -> None:
    raise MemoryError


def fill(base: Base, state_dir: str) -> None:
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("runs", app="web"), replace(with_extra(text="\x00"), identity=ELSEWHERE))
        store.add(metadata("ended"), end(RUNNING, 3, finished_at=9))
        store.add(metadata("gone"))
        store.delete("gone")
        store.put("k", "k", {"a": 1})
        wait_sent(store)


def test_a_lost_node_is_restored(base: Base, state_dir: str, tmp_path: object) -> None:
    """All records are there; what ran was on another machine, and is said to be unseen; the node goes on."""
    fill(base, state_dir)
    before = local_rows(state_dir)
    shutil.rmtree(state_dir)
    silence(base, "n7", 40)
    again = f"{state_dir}-again"
    restored = restore(base.url, "n7", again)
    assert (restored.containers, restored.sandboxes, restored.items, restored.left_out) == (2, 1, 1, [])
    assert local_rows(again) == before
    with Engine.open(again, node="n7", fleet=base.url) as engine:
        status = engine.store.get("runs").status
        assert (status.state, status.reason) == (ContainerState.EXITED, Reason.REBOOTED)
        assert engine.store.get("ended").status.exit_code == 3
        item = engine.store.find("k", "k")
        assert item is not None
        assert item.value == {"a": 1}
        assert engine.store.revision > restored.revision
        wait_sent(engine.store)
        with Fleet.open(base.url) as fleet:
            assert fleet.get("runs").status.reason == Reason.REBOOTED
    assert fleet_rows(base) == local_rows(again)
    checked = subprocess.run(
        [sys.executable, "-m", "limpet", "-s", again, "--node", "n7", "check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ok     records    checksums and history" in checked.stdout
    assert "WRONG  bundles" in checked.stdout  # those were on the lost machine


def test_the_old_one_is_fenced(base: Base, state_dir: str) -> None:
    """It is told who has taken over, and changes nothing in the fleet; its own store goes on."""
    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync") as old:
        old.put("k", "k", 1)
        with pytest.raises(errors.InvalidStateError, match=r"is alive: process .* take it over by force"):
            restore(base.url, "n7", f"{state_dir}-again")
        old.put("k", "k", 2)
        restore(base.url, "n7", f"{state_dir}-again", is_forced=True)
        with pytest.raises(errors.FleetFencedError, match=r"taken over in the fleet by process .*-again"):
            old.put("k", "k", 3)
        assert base.ask("SELECT value FROM limpet.item") == [("2",)]
        item = old.find("k", "k")
        assert item is not None
        assert item.value == 3
    with Store.open(f"{state_dir}-again", node="n7", fleet=base.url) as new:
        new.put("k", "k", 4)
        wait_sent(new)
    assert base.ask("SELECT value FROM limpet.item") == [("4",)]


def test_a_node_that_was_removed_by_hand_is_told(base: Base, state_dir: str) -> None:
    """Nobody has taken it over: opened again it is there, with all it has."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.put("k", "k", 1)
        wait_sent(store)
        base.ask("DELETE FROM limpet.fleet_node; DELETE FROM limpet.item")
        store.put("k", "k", 2)
        wait_until(lambda: store.fleet_lag and "was removed from the fleet" in store.fleet_lag.error, "it to be told")
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        wait_sent(store)
    assert base.ask("SELECT value FROM limpet.item") == [("2",)]


def test_another_directory_of_the_same_name_is_refused(base: Base, state_dir: str) -> None:
    """Two engines with one node's name: the second, and a copy of the directory, send nothing, and are told."""
    fill(base, state_dir)
    before = fleet_rows(base)
    shutil.copytree(state_dir, f"{state_dir}-copy")
    for path in (f"{state_dir}-other", f"{state_dir}-copy"):
        with Store.open(path, node="n7", fleet=base.url) as other:
            other.put("k", "of the other", 1)
            assert "is another state directory's in the fleet" in wait_for_trouble(other)
    assert fleet_rows(base) == before


def test_what_was_put_back_from_a_backup_changes_nothing(base: Base, state_dir: str) -> None:
    """It is told what the fleet has, also later, with as many changes; until the node's row is removed there."""
    fill(base, state_dir)
    shutil.copytree(state_dir, f"{state_dir}-backup")
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.delete("ended")
        store.put("k", "newer", 1)
        wait_sent(store)
    for name in ("store.db", "store.db-wal", "store.db-shm", "owner.json"):
        if os.path.exists(f"{state_dir}/{name}"):
            os.unlink(f"{state_dir}/{name}")
    shutil.copy(f"{state_dir}-backup/store.db", f"{state_dir}/store.db")
    before = fleet_rows(base)
    for _ in range(2):
        with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync") as store:
            assert "this state directory has not" in wait_for_trouble(store)
            for number in range(10):
                with pytest.raises(errors.FleetFencedError, match="restore the node from the fleet"):
                    store.put("k", "of the backup", number)
        assert fleet_rows(base) == before
    base.ask("DELETE FROM limpet.fleet_node")
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        wait_sent(store)
        assert store.find("k", "newer") is None
    assert fleet_rows(base) == local_rows(state_dir)


def test_a_restore_that_was_cut_off_loses_nothing(base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has made so far is no state directory: an engine there would have the fleet forget all."""
    fill(base, state_dir)
    shutil.rmtree(state_dir)
    before = fleet_rows(base)
    again = f"{state_dir}-again"
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(import_module("limpet.engine.fleet.restore"), "make_database", fail)
        restore(base.url, "n7", again, is_forced=True)
    for _ in range(2):
        with pytest.raises(errors.StateDirectoryError, match="its database was not: make it again"):
            Engine.open(again, node="n7", fleet=base.url)
    assert restore(base.url, "n7", again, is_forced=True).containers == 2
    identity = read_identity(again)
    assert identity is not None
    assert identity.original.endswith(f":{state_dir}"), "not the one that was cut off"
    with Engine.open(again, node="n7", fleet=base.url) as engine:
        wait_sent(engine.store)
        assert len(engine.list()) == 2
    assert len(fleet_rows(base)["item"]) == len(before["item"])


def test_a_database_that_is_new_changes_nothing(base: Base, state_dir: str) -> None:
    """Somebody has removed it, and what tells of it; the directory is the node's still."""
    fill(base, state_dir)
    before = fleet_rows(base)
    for name in os.listdir(state_dir):
        if name.startswith(("store.db", "owner.json")):
            os.unlink(f"{state_dir}/{name}")
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        assert "its database is new, or was put back" in wait_for_trouble(store)
    assert fleet_rows(base) == before


def test_the_command_restores(base: Base, state_dir: str) -> None:
    """It says what it has made; a directory with a database, and a node that nobody knows, are refused."""
    fill(base, state_dir)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "limpet", "fleet", "restore", *arguments, "--fleet", base.url],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert run("n9", f"{state_dir}-x").returncode == 3
    assert run("n7", f"{state_dir}-y").returncode == 4
    silence(base, "n7", 40)
    assert run("n7", state_dir).returncode == 4
    made = run("n7", f"{state_dir}-again", "-o", "json")
    assert json.loads(made.stdout)["containers"] == 2
    with Snapshot.open(f"{state_dir}-again", node="n7") as snapshot:
        assert sorted(snapshot.ids) == ["ended", "runs"]


@pytest.mark.parametrize("idle_seconds", [0.2, 600.0])
def test_who_stands_amid_a_transaction_is_in_nobodys_way(
    base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch, idle_seconds: float
) -> None:
    """A node that is stopped there, or has vanished, holds a lock: the server ends it, or whoever takes over does."""
    monkeypatch.setattr("limpet.engine.fleet.address._IDLE_SECONDS", idle_seconds)
    fill(base, state_dir)
    silence(base, "n7", 40)
    with closing(Address(base.url).open()) as stuck:
        batch.introduce(stuck, "n7")
        stuck.execute("SELECT FROM fleet_node FOR UPDATE")
        began = time.monotonic()
        assert restore(base.url, "n7", f"{state_dir}-again").containers == 2
        assert time.monotonic() - began < 20
        with pytest.raises(psycopg.Error):
            stuck.execute("SELECT 1")


def test_a_clock_that_is_off_changes_nothing(base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose clock is an hour ahead or behind is heard of, and falls silent, by the database's clock alone."""
    now = time.time_ns
    for offset in (3600, -3600):
        monkeypatch.setattr(time, "time_ns", lambda offset=offset: now() + offset * 10**9)
        monkeypatch.setattr(time, "time", lambda offset=offset: now() / 1e9 + offset)
        with Store.open(state_dir, node="n7", fleet=base.url) as store:
            store.put("k", "k", offset)
            wait_sent(store)
            with Fleet.open(base.url) as fleet:
                (node,) = fleet.nodes()
            assert node.is_heard
            assert 0 <= node.silent_seconds < 30
    silence(base, "n7", 40)
    with Fleet.open(base.url) as fleet:
        assert not fleet.nodes()[0].is_heard
