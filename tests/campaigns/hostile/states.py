"""Worlds whose state directory is spoilt while nobody has it open: its entries, and the rows of its database."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any, ClassVar
from zlib import crc32

import msgspec

from limpet.engine import Engine, Store
from limpet.engine.inspection import check, snapshot
from limpet.engine.inspection.check import check_state
from limpet.engine.inspection.dry_run import predict_recovery
from limpet.engine.inspection.snapshot import Snapshot
from limpet.schema.errors import LimpetError
from limpet.schema.status import Status
from tests.campaigns.hostile import values
from tests.campaigns.hostile.canary import differences, make_canary, photograph
from tests.campaigns.hostile.engines import TRICKS, clear
from tests.campaigns.hostile.oracle import Attempt

_CONFIG = {"metadata": {"name": "good"}, "image": {"image": "host"}, "command": ["true"], "labels": {"app": "web"}}
GOOD, BAD = "good", "bad"
_IN_2077 = 3_400_000_000 * 10**9


def make_state(state_dir: str) -> None:
    """Make a state with containers that are new, created, ended and released, closed in order."""
    with Engine.open(state_dir) as engine:
        engine.create_sandbox({"metadata": {"name": "pod"}}, id="pod")
        engine.create_sandbox({"metadata": {"name": "other"}}, id="other")
        for name in (GOOD, BAD, "ended", "released"):
            expires_at = _IN_2077 if name == BAD else 0
            engine.create_container(_CONFIG | {"metadata": {"name": name}}, "pod", id=name, expires_at=expires_at)
        engine.add_container(_CONFIG | {"metadata": {"name": "new"}}, "pod", id="new")
        engine.store.checkpoint("ended", Status(created_at=1, started_at=2, finished_at=3, exit_code=7, reason="Error"))
        engine.get("released").release()
    Engine.open(state_dir).close()  # the second opening makes all directories that there are


class _SpoiltState:
    """A state directory, copied from a good one before each input."""

    def __init__(self, place: Path) -> None:
        self.place = place
        make_canary(place)
        self._good = place / "template"
        make_state(str(self._good))
        self.state = place / "state"
        self._around = self._photograph()
        self._waits = check._LOOK_AGAIN_SECONDS, snapshot._READ_AGAIN_SECONDS
        check._LOOK_AGAIN_SECONDS = snapshot._READ_AGAIN_SECONDS = 0.0  # nobody writes who would have to be waited for

    def _photograph(self) -> dict[str, Any]:
        return photograph(self.place, apart_from=frozenset({"state", "out"}))

    def renew(self) -> None:
        """Put a good state in the place of whatever is there."""
        clear(self.state)
        shutil.copytree(self._good, self.state, symlinks=True)

    def inspect(self) -> str:
        """Nothing around has changed, the good state it was copied from included."""
        clear(self.state)  # and with it what a hard link in it does to the count of another file's names
        return differences(self._around, self._photograph())

    def close(self) -> None:
        """Nothing is open. Who writes while others look is waited for again."""
        check._LOOK_AGAIN_SECONDS, snapshot._READ_AGAIN_SECONDS = self._waits


class EntryWorld(_SpoiltState):
    """Something else in the place of an entry; other modes, owners; strange names in our directories."""

    ENTRIES = (
        "", "lock", "owner.json", "store.db", "store.db-wal", "store.db-shm", "store.db-journal", "containers",
        "sandboxes", "images", "quarantine", "backups", "containers/good", "containers/good/rootfs", "sandboxes/pod",
        "containers/good/.limpet.json", "containers/good/config.json", "images/lock", "images/blobs", "images/images",
        "images/blobs/sha256", "containers/stray", "sandboxes/stray", "images/images/stray.json", ".tmp-stray", "stray",
        "images/blobs/sha256/stray", "images/images/.tmp-stray",
    )  # fmt: skip

    def draw(self, random: Random) -> Attempt:
        entry = random.choice(self.ENTRIES)
        tricks = sorted(TRICKS.keys() - {"link to nothing"} if not entry else TRICKS)  # that one makes what it leads to
        trick = random.choice((*tricks, "mode", "owner", "name", "bytes", "bytes"))
        verbs = random.sample(sorted(_STATE_VERBS), 2)
        seed = random.randrange(1 << 32)
        shown = f"state/{entry}: {trick} ({seed}), then {', '.join(verbs)}"
        return Attempt(shown, lambda: self._run(entry, trick, verbs, Random(seed)))

    def _run(self, entry: str, trick: str, verbs: list[str], random: Random) -> None:
        self.renew()
        path = self.state / entry
        with suppress(NotADirectoryError, FileNotFoundError):
            self._spoil(path, trick, random)
        refused = None
        for verb in verbs:
            try:
                _STATE_VERBS[verb](str(self.state))
            except LimpetError as error:
                refused = error
        if refused:
            raise refused

    def _spoil(self, path: Path, trick: str, random: Random) -> None:
        if trick in TRICKS:
            TRICKS[trick](path, self.place / "around")
        elif trick == "mode" and not path.is_symlink():
            path.chmod(random.choice((0, 0o777, 0o1777, 0o4755, 0o500)))
        elif trick == "owner" and os.geteuid() == 0:
            os.chown(path, random.choice((1, 65534, 2**31)), 0, follow_symlinks=False)
        elif trick == "name":
            strange = os.fsencode(path if path.is_dir() else path.parent) + b"/" + values.file_name(random)
            make: Callable[[bytes], object] = random.choice((os.mkdir, os.mkfifo, lambda name: os.symlink("..", name)))
            with suppress(OSError):
                make(strange)
        elif trick == "bytes" and path.is_file():
            path.write_bytes(values.spoil_bytes(random, path.read_bytes()))


def _open_engine(state_dir: str) -> None:
    with Engine.open(state_dir) as engine:
        for container in engine.list():
            _ask(lambda each=container: each.cri_status())  # type: ignore[misc]
        # Whatever was spoilt: an engine that opens must work.
        sandbox = engine.create_sandbox({"metadata": {"name": "after"}})
        container = engine.create_container(_CONFIG | {"metadata": {"name": "after"}}, sandbox.id)
        container.release()
        container.delete()


def _ask(question: Callable[[], object]) -> None:
    with suppress(LimpetError):
        question()


def _look(state_dir: str) -> None:
    with Snapshot.open(state_dir) as seen:
        seen.list()
        for key in seen.ids:
            _ask(lambda each=key: seen.get(each))  # type: ignore[misc]
            _ask(lambda each=key: seen.metadata(each))  # type: ignore[misc]
            _ask(lambda each=key: seen.history(each))  # type: ignore[misc]
        predict_recovery(seen)


def _back_up(state_dir: str) -> None:
    target = os.path.join(os.path.dirname(state_dir), "out")
    clear(Path(target))
    with Snapshot.open(state_dir) as seen:
        from limpet.engine.database.sqlite import back_up

        seen.source.ask(lambda reader: back_up(reader, target))


_STATE_VERBS: dict[str, Callable[[str], object]] = {
    "engine": _open_engine,
    "engine again": _open_engine,
    "store": lambda path: Store.open(path).close(),
    "look": _look,
    "check": check_state,
    "back up": _back_up,
}


class RowWorld(_SpoiltState):
    """Rows that another program wrote: hostile values in every column, with right and with wrong checksums."""

    TABLES = (
        "container_status",
        "container_status",
        "container",
        "sandbox",
        "event",
        "deadline",
        "recovery",
        "node",
        "alembic_version",
    )
    WHOLE = ("node", "alembic_version")
    """Tables of one row, without which nothing can be said of the others."""
    _ROW_OF: ClassVar = {
        "container_status": ("bad", "new", "ended", "released"),
        "container": ("bad",),
        "sandbox": ("pod", "other"),
    }

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.renew()
        with closing(sqlite3.connect(self.state / "store.db")) as database:
            self._columns = {
                table: [row[1] for row in database.execute(f"PRAGMA table_info({table})")] for table in self.TABLES
            }

    def draw(self, random: Random) -> Attempt:
        table = random.choice(self.TABLES)
        key = random.choice(self._ROW_OF.get(table, ("",)))
        changes = {
            random.choice(self._columns[table]): _column_value(random) for _ in range(random.choice((1, 1, 2, 4)))
        }
        checksummed = random.random() < 0.7
        shown = f"{table} {key}: {changes!r:.500}, checksum {'right' if checksummed else 'wrong'}"
        return Attempt(shown, lambda: self._run(table, key, changes, checksummed=checksummed))

    def _run(self, table: str, key: str, changes: dict[str, Any], *, checksummed: bool) -> None:
        self.renew()
        self._write(table, key, changes, checksummed=checksummed)
        refused: LimpetError | None = None
        for verb in (_look, check_state, _use_each):
            try:
                verb(str(self.state))
            except LimpetError as error:
                if table not in self.WHOLE:
                    raise AssertionError(f"one bad row of {table} stops everything: {error}") from error
                refused = error
        if refused:
            raise refused

    def _write(self, table: str, key: str, changes: dict[str, Any], *, checksummed: bool) -> None:
        with closing(sqlite3.connect(self.state / "store.db", isolation_level=None)) as database:
            database.text_factory = lambda data: data.decode(errors="surrogateescape")
            where = f" WHERE id = '{key}'" if key else ""
            row = dict(
                zip(self._columns[table], database.execute(f"SELECT * FROM {table}{where}").fetchone(), strict=True)
            )
            row |= changes
            if checksummed and "checksum" in row:
                with suppress(UnicodeEncodeError, OverflowError, TypeError, ValueError):
                    row["checksum"] = crc32(msgspec.json.encode(tuple(list(row.values())[:-1])))
            marks = ", ".join(
                f"{name} = CAST(? AS TEXT)" if isinstance(value, bytes) else f"{name} = ?"
                for name, value in row.items()
            )
            with suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):  # what the tables refuse by themselves
                database.execute(f"UPDATE {table} SET {marks}{where}", tuple(row.values()))
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


_JSON = ("null", "[]", "{}", '{"requested":{}}', '{"requested":null}', '{"a":1}', "0", '"x"', "{", "9999")


def _column_value(random: Random) -> Any:
    match random.randrange(6):
        case 0 | 1:
            return random.choice([number for number in values.NUMBERS if abs(number) < 2**63])
        case 2:
            return values.text(random)
        case 3:
            return random.choice((*_JSON, values.DEEP_JSON))
        case 4:
            return None
    return values.file_name(random)  # bytes: text that need not be UTF-8


def _use_each(state_dir: str) -> None:
    """Open an engine, and do all that may be done with each container. One that is bad never stops the good one."""
    with Engine.open(state_dir) as engine:
        engine.list()
        engine.list(labels={"app": "web"})
        engine.list_sandboxes()
        engine.store.last_report()
        for key in (BAD, "new", "ended", "released"):
            if key not in engine.store:
                continue
            container = engine.get(key)
            for step in ("status", "metadata"):
                _ask(lambda each=container, name=step: getattr(each, name))  # type: ignore[misc]
            _ask(lambda each=key: engine.store.history(each))  # type: ignore[misc]
            for name in ("cri_status", "stop", "release", "delete"):
                _ask(lambda each=container, name=name: getattr(each, name)())  # type: ignore[misc]
        engine.recover()
        engine.store.checkpoint(GOOD, engine.store.status(GOOD))
        for sandbox in engine.list_sandboxes():
            _ask(sandbox.delete)
