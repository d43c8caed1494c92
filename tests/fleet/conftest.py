"""A PostgreSQL of the tests' own, in a private directory, and a database in it for each test."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Protocol

import psycopg
import pytest

from limpet.engine.starters.process.keeper.kernel import read_children
from tests.conftest import require_tools, wait_until

PASSWORD = "s3cret-of-the-fleet"
_numbers = count(1)


class Cluster:
    """One PostgreSQL, to be killed and started again."""

    def __init__(self, directory: str, *settings: str, primary: "Cluster | None" = None, name: str = "") -> None:
        """With `primary` it is a standby of that one, which knows it by `name`."""
        self.directory = directory
        self._settings = [word for setting in settings for word in ("-c", setting)]
        self._as_user = []
        if os.geteuid() == 0:  # it refuses to run as root
            shutil.chown(directory, "postgres", "postgres")
            self._as_user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups"]
        # It ends with whoever started it, however that ends; not by SIGINT, by which it would wait for its standby.
        self._until_end = ["setpriv", "--pdeathsig", "QUIT", *self._as_user[1:]]
        os.chmod(directory, 0o755)
        if primary is None:
            self._make()
        else:
            source = f"host={primary.directory} user=limpet application_name={name}"
            self._run("pg_basebackup", "-D", f"{directory}/data", "-d", source, "-R", "-X", "stream", "-c", "fast")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def _make(self) -> None:
        directory = self.directory
        self._run("initdb", "-D", f"{directory}/data", "-A", "trust", "-U", "limpet", "-N", "--no-locale", "-E", "UTF8")

    def _run(self, *command: str) -> None:
        subprocess.run([*self._as_user, *command], check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=60)

    def start(self) -> None:
        with open(f"{self.directory}.log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    *(*self._until_end, "postgres", "-D", f"{self.directory}/data", "-k", self.directory),
                    *("-c", "listen_addresses=", "-c", "max_connections=40"),
                    *self._settings,
                ],
                stdout=log,
                stderr=log,
                cwd="/",
            )
        wait_until(self._answers, "PostgreSQL to answer")

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            with open(f"{self.directory}.log", encoding="utf-8", errors="replace") as log:
                pytest.fail(f"PostgreSQL ended, {self._process.returncode}: {log.read()[-2000:]}")
        try:
            self.connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """End it at once, as `pg_ctl -m immediate stop` does."""
        self.end(signal.SIGQUIT)

    def stop(self) -> None:
        """End it in order, its connections cut."""
        self.end(signal.SIGINT)

    def promote(self) -> None:
        """Make a standby a primary, and return when it takes writes."""
        with self.connect("postgres") as connection:
            assert connection.execute("SELECT pg_promote(true, 30)").fetchall() == [(True,)]

    def end(self, number: signal.Signals) -> None:
        """Send the postmaster a signal, and wait until it has ended. May be repeated.

        A child that is just being forked may not be told of a QUIT, nor be killed then: PostgreSQL 15 waits for it.
        """
        assert self._process is not None
        self._process.send_signal(number)
        try:
            self._process.wait(10 if number == signal.SIGQUIT else 60)
        except subprocess.TimeoutExpired:
            if number != signal.SIGQUIT:
                raise
            for child in read_children(self._process.pid):
                os.kill(child, signal.SIGKILL)
            self._process.wait(60)

    def connect(self, database: str) -> "psycopg.Connection[Any]":
        return psycopg.connect(host=self.directory, dbname=database, user="limpet", autocommit=True)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://limpet:{PASSWORD}@/{database}?host={self.directory}"


class Place(Protocol):
    """Where databases are."""

    directory: str
    """Of its socket."""

    def connect(self, database: str) -> "psycopg.Connection[Any]":
        """Connect to one of them."""

    def url(self, database: str) -> str:
        """Return its URL."""


class Base:
    """One empty database."""

    def __init__(self, cluster: Place) -> None:
        self.cluster = cluster
        self.name = f"t{next(_numbers)}"
        with cluster.connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {self.name}")
        self.url = cluster.url(self.name)

    def ask(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self.cluster.connect(self.name) as connection:
            cursor = connection.execute(query, values or None)
            return cursor.fetchall() if cursor.description else []

    def cut_connections(self) -> None:
        """Have the server end every connection to this database but the asker's."""
        self.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
            self.name,
        )


@contextmanager
def running_cluster(*settings: str, primary: Cluster | None = None, name: str = "") -> Iterator[Cluster]:
    """Run a new PostgreSQL, which is removed again."""
    directory = tempfile.mkdtemp(prefix="limpet-pg-", dir="/tmp")  # short: a socket's path
    made = Cluster(directory, *settings, primary=primary, name=name)
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(directory)
        os.unlink(f"{directory}.log")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    require_tools("postgres", "initdb", "setpriv")
    # After a kill it would else flush every file of every database before it answers. A kill loses nothing written.
    with running_cluster("fsync=off") as made:
        yield made


@pytest.fixture
def base(cluster: Cluster) -> Base:
    return Base(cluster)


@pytest.fixture
def rewrite(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Break a statement of the fleet's, for a control."""
    from limpet.engine.fleet import batch, rows

    def change(name: str, find: Callable[[str], str]) -> None:
        module = batch if hasattr(batch, name) else rows
        old = getattr(module, name)
        new = {table: find(text) for table, text in old.items()} if isinstance(old, dict) else find(old)
        assert new != old
        monkeypatch.setattr(module, name, new)

    return change
