"""A PostgreSQL at one address, whose place there a standby takes when it is lost, again and again."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import psycopg

from tests.conftest import wait_until
from tests.fleet.conftest import Cluster, running_cluster

STANDBY = "s2"


@contextmanager
def standby_of(primary: Cluster, *settings: str) -> Iterator[Cluster]:
    """Run a synchronous standby: from now on no commit returns before it has it."""
    with running_cluster(*settings, primary=primary, name=STANDBY) as copy:
        _wait_for(primary)
        yield copy


def _wait_for(primary: Cluster) -> None:
    with primary.connect("postgres") as connection:
        connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'")
        connection.execute("SELECT pg_reload_conf()")
        wait_until(
            lambda: connection.execute("SELECT sync_state FROM pg_stat_replication").fetchall() == [("sync",)],
            "the standby to be synchronous",
        )


class Pair:
    """A primary, and a standby when there is one. Its address is a link to the directory of who is the primary."""

    def __init__(self, directory: str, *settings: str) -> None:
        """Start the primary. `directory` is for the link."""
        self.directory = f"{directory}/now"
        self._settings = settings
        self._primary_running, self._standby_running = ExitStack(), ExitStack()
        self._primary = self._primary_running.enter_context(running_cluster(*settings))
        self._standby: Cluster | None = None
        self._detained: int | None = None
        """The primary's process that sends to the standby, if it is stopped."""
        self._point()

    def close(self) -> None:
        """End both. May be repeated."""
        self._primary_running.close()  # first: else it would wait for its standby
        self._standby_running.close()

    def _point(self) -> None:
        os.symlink(self._primary.directory, f"{self.directory}.new")
        os.rename(f"{self.directory}.new", self.directory)

    def kill(self) -> None:
        """End the primary at once."""
        self._primary.kill()

    def start(self) -> None:
        """Start it again."""
        self._primary.start()

    def add_standby(self) -> None:
        """Have a synchronous standby, if there is none."""
        if self._standby is None:
            self._standby = self._standby_running.enter_context(standby_of(self._primary, *self._settings))

    def detain_standby(self) -> None:
        """Let nothing more through to the standby."""
        with self._primary.connect("postgres") as connection:
            ((self._detained,),) = connection.execute("SELECT pid FROM pg_stat_replication").fetchall()
        os.kill(self._detained, signal.SIGSTOP)

    def promote(self) -> None:
        """Lose the primary, and have the standby take its place."""
        assert self._standby is not None
        if self._detained is not None:
            os.kill(self._detained, signal.SIGKILL)  # the primary would wait for it
            self._detained = None
        self.kill()
        self._standby.promote()
        self._primary_running.close()
        self._primary, self._primary_running = self._standby, self._standby_running
        self._standby, self._standby_running = None, ExitStack()
        self._point()

    def connect(self, database: str) -> "psycopg.Connection[Any]":
        """Connect to the primary."""
        return self._primary.connect(database)

    def url(self, database: str) -> str:
        """Return the URL of a database, which stays."""
        return f"postgresql+psycopg://limpet@/{database}?host={self.directory}"


@contextmanager
def running_pair(*settings: str) -> Iterator[Pair]:
    """Run a new PostgreSQL, without a standby yet, which is removed again."""
    with TemporaryDirectory(prefix="limpet-pair-", dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        pair = Pair(directory, *settings)
        try:
            yield pair
        finally:
            pair.close()
