"""What becomes of the fleet's copy when things last long: an outage beyond the log, a standby that is away."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from msgspec.structs import replace

from limpet import Store, errors
from limpet.engine.fleet import Fleet, address
from tests.conftest import wait_until
from tests.fleet.conftest import Base, Cluster
from tests.fleet.test_shipping import fleet_rows, local_rows, wait_sent
from tests.records import RUNNING, metadata, sandbox


@pytest.fixture
def short_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the log of changes keep few events, and the fleet drop those that are dropped soon."""
    monkeypatch.setattr("limpet.engine.database.sqlite.event_log.KEPT_EVENTS", 100)
    monkeypatch.setattr("limpet.engine.fleet.shipper._PRUNED_AT_ONCE", 1)


@pytest.mark.usefixtures("short_log")
def test_an_outage_longer_than_the_log(base: Base, cluster: Cluster, state_dir: str) -> None:
    """Rows are compared where events are not kept any more: the fleet is as the node is, without what was deleted."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        for key in "abc":
            store.add(metadata(key), RUNNING)
        wait_sent(store)
        cluster.kill()
        try:
            store.delete("b")
            for number in range(400):
                store.put("k", "k", number)
            store.update("a", lambda status: replace(status, pid=99))
        finally:
            cluster.start()
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)
        assert base.ask("SELECT revision FROM limpet.fleet_node") == [(store.revision,)]


@pytest.mark.usefixtures("short_log")
def test_what_the_log_drops_the_fleet_drops(base: Base, state_dir: str) -> None:
    """The fleet's log does not grow for ever; histories of what is there stay."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        for number in range(600):
            store.put("k", "k", number)
            if number % 100 == 0:
                wait_sent(store)
        wait_sent(store)
        store.put("k", "k", "last")
        wait_sent(store)
        assert fleet_rows(base)["event"] == local_rows(state_dir)["event"]
        assert len(fleet_rows(base)["event"]) < 400


def wait_for_standby(base: Base, name: str) -> None:
    """Have all commits wait for the standby of this name, or for none."""
    base.ask(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    base.ask("SELECT pg_reload_conf()")
    wait_until(lambda: base.ask("SHOW synchronous_standby_names") == [(name,)], "the setting")


def test_a_commit_that_no_standby_has_is_not_acknowledged(base: Base, cluster: Cluster, state_dir: str) -> None:
    """PostgreSQL lets a commit that was cancelled while it waited succeed with a warning: that is no answer."""

    def cancel_waiting() -> object:
        return base.ask(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE datname = %s AND wait_event = 'SyncRep'",
            base.name,
        )

    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as store:
        store.put("k", "k", 1)
        wait_for_standby(base, "nobody")
        try:
            store.fleet._timeout = 0.5
            with pytest.raises(errors.FleetUnknownError):
                store.put("k", "k", 2)
            wait_until(cancel_waiting, "a commit that waits")
            wait_until(lambda: store.fleet_lag and "canceling wait" in store.fleet_lag.error, "the warning to be told")
            with pytest.raises(errors.FleetUnknownError):
                store.put("k", "k", 3)
        finally:
            wait_for_standby(base, "")
        store.fleet._timeout = 30
        store.put("k", "k", 4)
        assert fleet_rows(base) == local_rows(state_dir)


def test_a_database_with_settings_of_its_own(base: Base, cluster: Cluster, state_dir: str) -> None:
    """What is acknowledged in sync mode is durable there, though commits are not to wait for the disk by default."""
    for setting in (
        *("synchronous_commit = off", "client_min_messages = 'error'", "standard_conforming_strings = off"),
        *("default_transaction_isolation = 'serializable'", "lock_timeout = '1ms'", "search_path = 'none'"),
        *("array_nulls = off", "idle_session_timeout = '100ms'", "statement_timeout = '1s'"),
        *("idle_in_transaction_session_timeout = '1ms'", "quote_all_identifiers = on"),
    ):
        base.ask(f"ALTER DATABASE {base.name} SET {setting}")
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name LIKE 'limpet n7%%'"
    with Store.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"))
        for number in range(10):
            store.put("k", "k", number)
        time.sleep(0.4)  # in which nothing is sent
        assert base.ask("SELECT value FROM limpet.item") == [("9",)]
        assert base.ask(f"{sessions} AND clock_timestamp() - backend_start > '0.4 s'", base.name) == [(1,)]
        cluster.kill()
    cluster.start()  # and nobody sends again what was lost
    assert base.ask("SELECT value FROM limpet.item") == [("9",)]


def test_a_fleet_that_was_lost_is_sent_all_again(base: Base, state_dir: str) -> None:
    """By a node that is open still; a node whose row alone was removed is told so, and sends nothing more."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        wait_sent(store)
        base.ask("DROP SCHEMA limpet CASCADE")
        store.update("a", lambda status: replace(status, pid=8))
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)
        base.ask("DELETE FROM limpet.fleet_node")
        store.update("a", lambda status: replace(status, pid=9))
        wait_until(lambda: store.fleet_lag is not None and "was removed" in store.fleet_lag.error, "it to be told")
        assert store.status("a").pid == 9


@pytest.mark.parametrize(
    "is_opened_anew",
    [
        pytest.param(False, marks=pytest.mark.long, id="since it was opened"),
        pytest.param(True, id="before it was opened"),
    ],
)
def test_a_fleet_that_went_back_is_set_right(
    base: Base, cluster: Cluster, state_dir: str, *, is_opened_anew: bool
) -> None:
    """From a backup, or a standby that lacked the last changes: a node that is open sends what was confirmed, too."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        wait_sent(store)
    if is_opened_anew:
        back_up(cluster)
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        if not is_opened_anew:
            wait_sent(store)
            back_up(cluster)
        store.update("a", lambda status: replace(status, pid=8))
        store.add(metadata("b"), RUNNING)
        wait_sent(store)
        restore(cluster)
        store.put("k", "k", 1)
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)


def back_up(cluster: Cluster) -> None:
    cluster.stop()
    shutil.rmtree(f"{cluster.directory}/backup", ignore_errors=True)
    subprocess.run(["cp", "-a", f"{cluster.directory}/data", f"{cluster.directory}/backup"], check=True)
    cluster.start()


def restore(cluster: Cluster) -> None:
    cluster.stop()
    shutil.rmtree(f"{cluster.directory}/data")
    os.rename(f"{cluster.directory}/backup", f"{cluster.directory}/data")
    cluster.start()


def test_a_server_that_hangs_is_given_up(base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is connected, says nothing and cancels nothing: a writer and a reader are told, and go on elsewhere."""
    session = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name LIKE 'limpet%%'"
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.put("k", "k", 1)
        wait_sent(store)
        fleet = Fleet.open(base.url)
        monkeypatch.setattr(address, "_SILENT_SECONDS", 0.3)
        hanging = [pid for (pid,) in base.ask(session, base.name)]
        assert len(hanging) == 2
        try:
            for pid in hanging:
                os.kill(pid, signal.SIGSTOP)
            store.put("k", "k", 2)
            wait_until(lambda: store.fleet_lag and "said nothing for 0.3 s" in store.fleet_lag.error, "it to be told")
            assert [node.name for node in fleet.nodes()] == ["n7"]  # by another session
        finally:
            for pid in hanging:
                os.kill(pid, signal.SIGCONT)
        fleet.close()
        monkeypatch.undo()
        wait_sent(store)
        assert base.ask("SELECT value FROM limpet.item") == [("2",)]


def test_a_standby_that_is_away_for_long_is_waited_for_once(
    base: Base, state_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives up a commit that waits has the server end it: its sessions would else be used up."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event = 'SyncRep'"
    seen: set[tuple[int, ...]] = set()

    def has_tried(times: int) -> bool:
        now = tuple(pid for (pid,) in base.ask(waiting, base.name))
        assert len(now) <= 1
        seen.add(now)
        return len(seen - {()}) >= times

    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.put("k", "k", 1)
        wait_sent(store)
        monkeypatch.setattr(address, "_SILENT_SECONDS", 0.2)
        wait_for_standby(base, "nobody")
        try:
            store.put("k", "k", 2)
            wait_until(lambda: has_tried(3), "three sessions, one after the other")
        finally:
            wait_for_standby(base, "")
        wait_sent(store)
        assert fleet_rows(base) == local_rows(state_dir)
