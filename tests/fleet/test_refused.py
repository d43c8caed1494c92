"""A database that refuses: its disk is full, or its user lacks a right. The node tells, goes on, and catches up."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from limpet import Engine, Store, errors
from limpet.engine.fleet import Fleet
from limpet.schema.status import ContainerState
from tests.conftest import require_namespaces, require_tools, wait_until
from tests.fleet.conftest import PASSWORD, Base, running_cluster
from tests.fleet.test_shipping import fleet_rows, local_rows, wait_sent
from tests.records import RUNNING, metadata, sandbox

_LARGE = 30_000
"""Bytes, random and so not compressed."""


def wait_for_error(store: Store, what: str) -> None:
    """Wait until the node says that the fleet refuses, and why."""

    def is_told() -> bool:
        lag = store.fleet_lag
        assert lag is not None
        return what in lag.error and lag.seconds > 0

    wait_until(is_told, f"{what!r} to be told ({store.fleet_lag})")


@pytest.fixture
def cramped() -> Iterator[Base]:
    """A database whose tables are on a disk of 24 MB, of a PostgreSQL of its own."""
    require_tools("mount", "postgres", "initdb", "setpriv")
    if os.geteuid():
        pytest.skip("only root can mount")
    require_namespaces()
    disk = tempfile.mkdtemp(prefix="limpet-disk-", dir="/tmp")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,uid=postgres,mode=700", "limpet", disk], check=True)
    try:
        with running_cluster("fsync=off") as cluster:
            made = Base(cluster)
            made.ask(f"CREATE TABLESPACE small LOCATION '{disk}'")
            made.ask(f"ALTER DATABASE {made.name} SET default_tablespace = small")
            yield made
    finally:
        subprocess.run(["umount", disk], check=True)
        os.rmdir(disk)


@pytest.mark.long
def test_a_full_disk_there_harms_nobody_here(cramped: Base, state_dir: str) -> None:
    """Containers live on, calls in sync mode say what is not known, and all of it arrives once there is room again."""
    base = cramped
    with Engine.open(state_dir, node="n7", fleet=base.url, fleet_ack="sync", fleet_timeout=30) as engine:
        engine.create_sandbox({"metadata": {"name": "jobs"}}, id="jobs")
        base.ask("CREATE TABLE filler (content text)")
        with pytest.raises(psycopg.errors.DiskFull):
            while True:
                base.ask("INSERT INTO filler SELECT gen_random_uuid() FROM generate_series(1, 20000)")
        engine.store.fleet._timeout = 1
        refused: list[errors.FleetUnknownError] = []
        for number in range(100):
            try:
                engine.store.put("k", str(number), os.urandom(_LARGE).hex())
            except errors.FleetUnknownError as error:
                refused.append(error)
                if len(refused) == 2:
                    break
        assert ["durable on this node" in str(error) for error in refused] == [True, True]
        wait_for_error(engine.store, "No space left on device")
        with pytest.raises(errors.FleetUnknownError, match="No space left on device"):
            engine.create_container(
                {"metadata": {"name": "c"}, "image": {"image": "host"}, "command": ["sleep", "1000"]}, "jobs", id="c"
            )
        container = engine.get("c")
        with pytest.raises(errors.FleetUnknownError):
            container.start()
        assert container.state is ContainerState.RUNNING
        base.ask("DROP TABLE filler")
        wait_sent(engine.store)
        assert fleet_rows(base) == local_rows(state_dir)
        engine.store.fleet._timeout = 30
        assert container.stop(0).exit_code == 137


def weaken(base: Base, user: str, rights: str) -> str:
    """Make a user who may connect and no more; return its URL."""
    base.ask(f"CREATE ROLE {user} LOGIN")
    for statement in filter(None, rights.split(";")):
        base.ask(statement.format(user=user))
    return base.url.replace(f"limpet:{PASSWORD}@", f"{user}:{PASSWORD}@")


@pytest.mark.parametrize(
    ("is_made", "lacks", "what", "gives"),
    [
        (False, "", "permission denied for database", "GRANT CREATE ON DATABASE {base} TO {user}"),
        (True, "", "permission denied for schema limpet", "GRANT limpet TO {user}"),
        (
            True,
            "GRANT USAGE ON SCHEMA limpet TO {user};GRANT SELECT ON ALL TABLES IN SCHEMA limpet TO {user}",
            "permission denied for table",
            "GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA limpet TO {user}",
        ),
    ],
)
def test_who_lacks_a_right_is_told(
    base: Base, state_dir: str, tmp_path: Path, is_made: bool, lacks: str, what: str, gives: str
) -> None:
    """The node works meanwhile; with the right given, all of it arrives, without a restart."""
    user = f"user_{base.name}"
    if is_made:
        with Store.open(str(tmp_path / "another"), node="n8", fleet=base.url) as another:
            another.put("k", "k", 1)
            wait_sent(another)
    url = weaken(base, user, lacks)
    with Store.open(state_dir, node="n7", fleet=url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        wait_for_error(store, what)
        assert store.fleet_lag is not None
        assert PASSWORD not in store.fleet_lag.error
        base.ask(gives.format(base=base.name, user=user))
        wait_sent(store)
    assert base.ask("SELECT id FROM limpet.container WHERE node = 'n7'") == [("a",)]


def test_who_may_not_look_is_told(base: Base, state_dir: str) -> None:
    """A viewer without rights hears which is missing; one who may read needs no right to write."""
    with Store.open(state_dir, node="n7", fleet=base.url) as store:
        store.add_sandbox(sandbox())
        store.add(metadata("a"), RUNNING)
        wait_sent(store)
    user = f"user_{base.name}"
    url = weaken(base, user, "")
    looks: list[Callable[[Fleet], object]] = [Fleet.nodes, Fleet.list, lambda fleet: fleet.get("a")]
    for look in looks:
        with Fleet(url) as fleet, pytest.raises(errors.FleetError, match="permission denied for schema limpet"):
            look(fleet)
    base.ask(f"GRANT USAGE ON SCHEMA limpet TO {user}")
    base.ask(f"GRANT SELECT ON ALL TABLES IN SCHEMA limpet TO {user}")
    with Fleet(url) as fleet:
        assert [one.id for one in fleet.list()] == ["a"]
        assert fleet.nodes()[0].name == "n7"
        assert len(list(fleet.events())) > 0
