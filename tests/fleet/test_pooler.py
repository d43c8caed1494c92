"""Behind a pooler that gives each transaction another session, or one to many: nobody finds what another has set."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from limpet import Store
from limpet.engine.fleet import Fleet, find_differences, remove_tables
from tests.conftest import require_tools, wait_until
from tests.fleet.conftest import Base
from tests.fleet.test_shipping import wait_sent
from tests.records import RUNNING, metadata, sandbox

PORT = 6543
"""In the name of a socket alone."""


@contextmanager
def running_pooler(base: Base) -> Iterator[str]:
    """Run a pgbouncer with one session for all, beside the server's socket; yield the directory of its own."""
    require_tools("pgbouncer", "setpriv")
    directory = base.cluster.directory  # of the user who may run it
    config = Path(f"{directory}/pgbouncer.ini")
    config.write_text(
        f"[databases]\n* = host={directory} user=limpet\n[pgbouncer]\nlisten_addr =\nlisten_port = {PORT}\n"
        f"unix_socket_dir = {directory}\nauth_type = any\npool_mode = transaction\ndefault_pool_size = 1\n"
        "server_round_robin = 1\n"
    )
    config.chmod(0o644)
    as_user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups"] if os.geteuid() == 0 else []
    pooler = subprocess.Popen([*as_user, "pgbouncer", "-q", str(config)], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _listens(f"{directory}/.s.PGSQL.{PORT}"), "pgbouncer")
        yield directory
    finally:
        pooler.terminate()
        pooler.wait(10)


def test_who_shares_a_session_finds_nothing_of_others(base: Base, tmp_path: Path) -> None:
    """Two fleets in one database, each with a node of the same name, and a stranger: each keeps to its own tables."""
    base.ask("CREATE SCHEMA strangers")
    with running_pooler(base) as directory:
        place = f"postgresql://limpet@/{base.name}?host={directory}&port={PORT}"
        stranger = psycopg.connect(place, autocommit=True, prepare_threshold=None)
        path = stranger.execute("SELECT set_config('search_path', 'strangers', false)").fetchone()
        fleets = [f"{place}&schema={name}" for name in ("one", "two")]
        stores = [Store.open(tmp_path / str(number), node="n", fleet=url) for number, url in enumerate(fleets)]
        for store in stores:
            store.add_sandbox(sandbox())
        for turn in range(8):  # more often than a statement must come to be prepared
            for number, store in enumerate(stores):
                store.add(metadata(f"c{number}{turn}"))
                store.checkpoint(f"c{number}{turn}", RUNNING)
                wait_sent(store)
        assert stranger.execute("SELECT current_setting('search_path')").fetchone() == path
        assert stranger.execute("SELECT current_setting('application_name') LIKE 'limpet n%'").fetchone() == (False,)
        for number, url in enumerate(fleets):
            with Fleet.open(url) as fleet:
                assert [one.id for one in fleet.list()] == [f"c{number}{turn}" for turn in range(8)]
            stores[number].close()
        stranger.close()
        for number, name in enumerate(("one", "two")):
            own = f"{base.url}&schema={name}"
            assert find_differences(own, "n", str(tmp_path / str(number) / "store.db")) == []
            remove_tables(own)


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0
