"""Stores that are broken on purpose, one promise each: what the crash tests must find."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from limpet.engine.database import Changes
from limpet.engine.database.sqlite.writer import Writer
from limpet.engine.drill.controls import DeafLife, HastyLife
from limpet.engine.drill.opening import replace_pragmas
from limpet.engine.drill.store_life import FailingDiskLife, StoreLife
from limpet.engine.store import Draft, Request, Store

_write, _commit = Store._write, Store._commit


class Altered(StoreLife):
    """The store's life with things replaced in the process that lives it; its check is the real one."""

    def __init__(self, *replaced: tuple[object, str, object], checkpoints: int = 2, seed: int = 0) -> None:
        super().__init__(checkpoints, seed=seed)
        self._replaced = replaced

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        for owner, name, value in self._replaced:
            setattr(owner, name, value)
        super().live(directory, acknowledge)


class AlteredOnFailingDisk(Altered, FailingDiskLife):
    """The same where the disk fails."""


def small_wal(seed: int) -> Altered:
    """A sound store's life whose WAL is begun anew every few commits: by the writer, or for odd seeds by SQLite."""
    small = replace_pragmas(wal_autocheckpoint=("4", 4), journal_size_limit=("16384", 16384))
    pragmas = StoreLife, "pragmas", small
    by_writer = _module("database.sqlite.writer"), "WAL_BYTES", 16384
    return Altered(pragmas, *(() if seed % 2 else (by_writer,)), checkpoints=24, seed=seed)


def _with_pragma(name: str, value: str, read_back: object) -> tuple[object, str, object]:
    return StoreLife, "pragmas", replace_pragmas(**{name: (value, read_back)})


def _module(name: str) -> object:
    from importlib import import_module

    return import_module(f"limpet.engine.{name}")


def _do_nothing(*_: object) -> None: ...


def _write_by_halves(store: Store, draft: Draft) -> None:
    """Commit a transaction over several containers one at a time."""
    if len(draft.changes.statuses) < 2 or draft.changes.reports:
        return _write(store, draft)
    for key, change in draft.changes.statuses.items():
        store._journal.commit(Changes(statuses={key: change}))
    draft.changes.statuses = {}
    return _write(store, draft)


def _answer_before_commit(store: Store, requests: Sequence[Request]) -> None:
    """Tell those who ride in a batch that it is done, then do it."""
    for request in requests:
        if len(requests) > 1:
            request.finish()
    _commit(store, requests)


def _always_landed(writer: Writer, changes: Changes, error: BaseException) -> bool:
    """Take every commit that failed for one that succeeded."""
    return True


_NO_DIRECTORY_FLUSH = (
    (_module("state.durable"), "sync_directory", _do_nothing),
    (_module("state.durable"), "_sync_name", _do_nothing),
    (_module("database.sqlite.migrate"), "sync_directory", _do_nothing),
    (_module("database.sqlite.opening"), "sync_directory", _do_nothing),
)


class Mutant(NamedTuple):
    """A broken life, the trial that must notice it, and how many of its points are enough for that: each k-th."""

    life: Callable[[], StoreLife]
    trial: str
    every: int = 1


KILLS, POWER, DISK = (
    "kill_points({life}, workers={workers})",
    "power_cuts({life}, samples=1, every={every}, workers={workers})",
    "fault_points({life}, failures={{'flush': ['EIO']}}, cuts=0, every={every}, workers={workers})",
)

MUTANTS = {
    "synchronous off": Mutant(lambda: Altered(_with_pragma("synchronous", "off", 0)), POWER, 12),
    "synchronous normal": Mutant(lambda: Altered(_with_pragma("synchronous", "normal", 1)), POWER, 12),
    "no flush of directories": Mutant(lambda: Altered(*_NO_DIRECTORY_FLUSH), POWER, 6),
    "acknowledged before it is written": Mutant(lambda: HastyLife(2), KILLS),
    "a transaction in several commits": Mutant(lambda: Altered((Store, "_write", _write_by_halves)), KILLS),
    "a batch that is told too early": Mutant(lambda: Altered((Store, "_commit", _answer_before_commit)), KILLS),
    "a backup whose name is not flushed": Mutant(
        lambda: Altered((_module("database.sqlite.backup"), "sync_directory", _do_nothing)), POWER, 3
    ),
    "a backup made in place": Mutant(
        lambda: Altered(
            (_module("database.sqlite.backup"), "temporary_path", lambda directory: f"{directory}/backup-0.db"),
            (_module("database.sqlite.backup"), "rename_new", _do_nothing),
        ),
        KILLS,
    ),
    "errors that are not heard": Mutant(lambda: DeafLife(1), DISK, 4),
    "a failed commit taken for done": Mutant(
        lambda: AlteredOnFailingDisk((Writer, "has_landed", _always_landed), checkpoints=1), DISK, 2
    ),
}
"""Those of the store's life. Six broken engines, two that trust pids and boots, and a store that believes its rows are
caught by the tests of the drill and of damaged states."""
