"""The life of a store that an older limpet left when it was killed: its newest commits are in the WAL alone."""

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from limpet.engine.database.sqlite.connection import connect_writer
from limpet.engine.drill.old_database import make_old_database
from limpet.engine.drill.records import RUNNING, SANDBOX, make_metadata
from limpet.engine.state.durable import sync_directory
from limpet.engine.store.store import Store
from limpet.schema.layout import DEFAULT_NODE
from limpet.testing import Violation

_OTHERS = {f"other{number}": number for number in range(1, 6)}
"""The epochs of other nodes, which must all be there after the upgrade."""


def _leave_old_state() -> dict[str, bytes]:
    """Return the files of a state directory of the oldest schema, as a kill leaves them."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/store.db"
        make_old_database(path, "0001")
        with closing(connect_writer(path)) as connection:
            for row in {DEFAULT_NODE: 3, **_OTHERS}.items():
                connection.execute("INSERT INTO node VALUES (?, ?, 1)", row)
                connection.commit()
            files = {name: Path(directory, name).read_bytes() for name in ("store.db", "store.db-wal")}
    return files | {"owner.json": json.dumps({"pid": 1, "epoch": 3, "closed": False}).encode(), "lock": b""}


class Upgrade:
    """Opened, which migrates it; filled; opened again."""

    def __init__(self) -> None:
        self._files = _leave_old_state()

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        self._put_old_state(f"{directory}/state")
        acknowledge(b"old")
        with Store.open(f"{directory}/state") as store:
            acknowledge(b"open")
            store.add_sandbox(SANDBOX)
            store.add(make_metadata("a"), RUNNING)
            acknowledge(b"added")
        Store.open(f"{directory}/state").close()

    def _put_old_state(self, path: str) -> None:
        """Put all files there at once, and durably: what is tried is what comes after."""
        os.mkdir(f"{path}.new", 0o700)
        for name, content in self._files.items():
            descriptor = os.open(f"{path}.new/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                left = content
                while left:
                    left = left[file.write(left) :]
                os.fsync(descriptor)
        sync_directory(f"{path}.new")
        os.rename(f"{path}.new", path)
        sync_directory(os.path.dirname(path))

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        shutil.rmtree(f"{directory}/state.new", ignore_errors=True)
        if not os.path.exists(f"{directory}/state"):
            if acknowledged:
                raise Violation("lost", "the state directory is gone")
            return
        for _ in range(2):
            with Store.open(f"{directory}/state") as store:
                if b"added" in acknowledged and store.status("a").pid != RUNNING.pid:
                    raise Violation("lost", "container a is not what was acknowledged")
        with closing(sqlite3.connect(f"{directory}/state/store.db")) as raw:
            epochs = dict(raw.execute("SELECT name, epoch FROM node"))
        epoch = epochs.pop(DEFAULT_NODE)
        if epochs != _OTHERS or epoch < 5 + (b"open" in acknowledged):
            raise Violation("lost", f"the epochs are {epoch} and {epochs}")
