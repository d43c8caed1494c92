"""Small stores that the crash tests are tried on: one that keeps its promises, and broken ones of every kind."""

import contextlib
import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Sequence

from limpet.testing import Violation

Acknowledge = Callable[[bytes], None]
KEYS = 3


def payload(number: int) -> bytes:
    """What the checkpoint of this number holds, with a checksum of its own."""
    body = hashlib.sha256(b"%d" % number).digest() * 4
    return body + zlib.crc32(body).to_bytes(4, "big")


class SQLiteCheckpoints:
    """Checkpoints in SQLite: each adds a history row and replaces the head of its key, in one transaction."""

    def __init__(
        self,
        *,
        journal: str = "wal",
        synchronous: str = "FULL",
        count: int = 12,
        acknowledge_early: bool = False,
        transactions: int = 1,
        parents: str = "",
        sync_parents: bool = True,
    ) -> None:
        self.journal, self.synchronous, self.count = journal, synchronous, count
        self.acknowledge_early, self.transactions = acknowledge_early, transactions
        self.parents, self.sync_parents = parents, sync_parents

    def live(self, directory: str, acknowledge: Acknowledge) -> None:
        place = self._make_parents(directory)
        with contextlib.closing(sqlite3.connect(f"{place}/s.db", isolation_level=None)) as db:
            assert db.execute(f"pragma journal_mode={self.journal}").fetchone() == (self.journal,)
            db.execute(f"pragma synchronous={self.synchronous}")
            db.execute("pragma wal_autocheckpoint=8")
            db.execute("create table if not exists head(key integer primary key, number int, body blob)")
            db.execute("create table if not exists history(number integer primary key, body blob)")
            for number in range(1, self.count + 1):
                self._checkpoint(db, number, acknowledge)

    def _make_parents(self, directory: str) -> str:
        place = directory
        for name in filter(None, self.parents.split("/")):
            os.mkdir(f"{place}/{name}")
            if self.sync_parents:
                sync(place)
            place = f"{place}/{name}"
        return place

    def _checkpoint(self, db: sqlite3.Connection, number: int, acknowledge: Acknowledge) -> None:
        db.execute("begin immediate")
        db.execute("insert into history values (?, ?)", (number, payload(number)))
        if self.transactions == 2:
            db.execute("commit")
            db.execute("begin immediate")
        db.execute("insert or replace into head values (?, ?, ?)", (number % KEYS, number, payload(number)))
        if self.acknowledge_early:
            acknowledge(b"%d" % number)
        db.execute("commit")
        if not self.acknowledge_early:
            acknowledge(b"%d" % number)

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        promised = len(acknowledged)
        path = os.path.join(directory, self.parents, "s.db")
        if not os.path.exists(path):
            require(not promised, "lost", f"the database is gone, {promised} acknowledged")
            return
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            result = db.execute("pragma integrity_check").fetchall()
            require(result == [("ok",)], "torn", f"integrity_check: {result}")
            tables = {name for (name,) in db.execute("select name from sqlite_master where type='table'")}
            if "history" not in tables:
                require(not promised, "lost", f"no table, {promised} acknowledged")
                return
            rows = db.execute("select number, body from history order by number").fetchall()
            head = {key: row for key, *row in db.execute("select key, number, body from head")}
        require(rows == [(n, payload(n)) for n in range(1, len(rows) + 1)], "torn", "history has gaps or bad rows")
        require(len(rows) >= promised, "lost", f"{len(rows)} of {promised} acknowledged are there")
        require(len(rows) <= promised + 1, "false_verdict", f"{len(rows)} are there, {promised} were acknowledged")
        require(head == {number % KEYS: [number, body] for number, body in rows}, "torn", "head and history differ")


class JSONFiles:
    """Checkpoints as one JSON file per key, written as people write them."""

    def __init__(self, *steps: str, count: int = 8) -> None:
        self.steps, self.count = steps, count

    def live(self, directory: str, acknowledge: Acknowledge) -> None:
        for number in range(1, self.count + 1):
            path = f"{directory}/{number % KEYS}.json"
            target = f"{path}.tmp" if "rename" in self.steps else path
            with open(target, "w", encoding="utf-8") as file:
                json.dump({"number": number, "body": payload(number).hex()}, file)
                file.flush()
                if "fsync" in self.steps:
                    os.fsync(file.fileno())
            if "rename" in self.steps:
                os.rename(target, path)
            if "directory" in self.steps:
                sync(directory)
            acknowledge(b"%d" % number)

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        newest = {int(number) % KEYS: int(number) for number in acknowledged}
        for key in range(KEYS):
            path, found = f"{directory}/{key}.json", 0
            if os.path.exists(path):
                found = self._read(path)
            require(found >= newest.get(key, 0), "lost", f"key {key}: {found}, acknowledged {newest.get(key)}")

    @staticmethod
    def _read(path: str) -> int:
        with open(path, "rb") as file:
            try:
                content = json.load(file)
                number = int(content["number"])
                whole = content["body"] == payload(number).hex()
            except (ValueError, KeyError, TypeError) as error:
                raise Violation("torn", f"{path}: {error}") from error
        require(whole, "torn", f"{path}: wrong body")
        return number


def require(holds: bool, kind: str, message: str) -> None:
    if not holds:
        raise Violation(kind, message)  # type: ignore[arg-type] # a literal at every call


def sync(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
