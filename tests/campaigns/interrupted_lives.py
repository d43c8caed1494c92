"""The lives that tests/campaigns/interrupts.py interrupts: of a store that a thread uses as well, and of tasks."""

import _thread
import asyncio
import gc
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import pytest
from msgspec.structs import replace

from limpet.engine import Store
from limpet.engine.aio import AsyncStore
from limpet.engine.database.sqlite import connection as sqlite_connection
from limpet.engine.database.sqlite import writer as sqlite_writer
from limpet.engine.store import Draft
from limpet.schema.errors import LimpetError
from limpet.schema.status import Status
from tests.records import RUNNING, metadata, sandbox

State = dict[str, int]
"""What containers there are, each with its exit code, which counts its changes."""
_ANSWER_SECONDS = 15
_COUNTED = "counted"
"""The container that the other thread changes."""
_SANDBOX = sandbox()
_METADATA = {name: metadata(name) for name in ("a", "b", _COUNTED)}


def bump(old: Status) -> Status:
    return replace(old, exit_code=old.exit_code + 1)


def _change(draft: Draft) -> None:
    draft.update("a", bump)
    draft.add(_METADATA["b"], RUNNING)


class Life(Protocol):
    """A script of calls of limpet, in a directory. Each trial makes a new one, in a process of its own."""

    strikes: int
    """How often it was struck."""

    @property
    def keeps_unclosed(self) -> int:
        """How many more descriptors may stay open where it is forgotten and not closed: threads that wait have some."""

    def live(self) -> None:
        """Make the calls, in the main thread, and note what was acknowledged. What strikes a call is raised."""

    def leave(self) -> None:
        """Close everything, as a `finally` would. May be struck, and is called again then."""

    def forget(self) -> None:
        """Write down what was acknowledged, to STATE_DIR.notes, and drop everything without closing it."""

    def read_notes(self) -> None:
        """Take over what the life had noted, in another process, when it was forgotten."""

    def find_lies(self) -> Iterator[str]:
        """Open anew, use it, and close; yield what is not as it was acknowledged, and threads that were not answered.

        What was being changed when the life was struck may be changed or not, as a whole.
        """


class StoreLife:
    """A store's life, while another thread counts in it."""

    keeps_unclosed = 0
    strikes = 0

    def __init__(self, state_dir: str) -> None:
        self._state_dir = state_dir
        self._store: Store | None = None
        self._done: State = {}
        """What was acknowledged."""
        self._maybe: State = {}
        """What may be instead: with the change that was being made."""
        self._backups: list[str] = []
        self._counted = 0
        self._wrong: list[str] = []
        self._ended: threading.Event
        self._has_thread = False

    def live(self) -> None:
        self._store = store = Store.open(self._state_dir)
        store.add_sandbox(_SANDBOX)
        store.add(_METADATA[_COUNTED], RUNNING)
        self._ended = threading.Event()
        _thread.start_new_thread(self._count, (store,))  # Thread.start() may wait for ever without memory
        self._has_thread = True
        self._step({"a": 0}, lambda: store.add(_METADATA["a"], RUNNING))
        self._step({"a": 1}, lambda: store.update("a", bump))
        self._step({"a": 2}, lambda: store.checkpoint("a", replace(RUNNING, exit_code=2)))
        self._step({"a": 3, "b": 0}, lambda: self._transact(store))
        store.history("a")
        store.list(name="a")
        self._back_up(store)
        self._step({"a": 3}, lambda: store.delete("b"))
        store.close()

    def leave(self) -> None:
        if self._store is not None:
            self._store.close()

    def forget(self) -> None:
        self._write_notes()
        self._store = None
        gc.collect()

    def find_lies(self) -> Iterator[str]:
        if self._has_thread and not self._ended.wait(_ANSWER_SECONDS):
            yield "another caller waits for ever"
        yield from self._wrong
        self._store = None
        with Store.open(self._state_dir) as store:
            found = {record.id: record.status.exit_code for record in store.list()}
            counted = found.pop(_COUNTED, 0)
            if found not in (self._done, self._maybe):
                yield f"{found} is there, {self._done} was acknowledged (or {self._maybe})"
            if counted < self._counted or (self._has_thread and counted > self._counted + 1):
                yield f"{counted} is there, {self._counted} was counted"
            if _COUNTED in store:
                store.update(_COUNTED, bump)
        for path in self._backups:
            yield from _find_bad_backup(path)

    def read_notes(self) -> None:
        """Take over what a life in another process had acknowledged."""
        with open(f"{self._state_dir}.notes") as file:
            self._done, self._maybe, self._backups, self._counted = json.load(file)

    def _write_notes(self) -> None:
        with open(f"{self._state_dir}.notes", "w") as file:
            json.dump([self._done, self._maybe, self._backups, self._counted], file)

    def _step(self, then: State, call: Callable[[], object]) -> None:
        self._maybe = then
        call()
        self._done = then

    def _transact(self, store: Store) -> None:
        with store.transaction() as draft:
            _change(draft)

    def _back_up(self, store: Store) -> None:
        path = f"{self._state_dir}.backup"
        store.back_up(path)
        self._backups = [path]

    def _count(self, store: Store) -> None:
        while True:
            try:
                counted = store.update(_COUNTED, bump).exit_code
            except BaseException as error:  # noqa: BLE001  # closed, or hit: an answer
                if not isinstance(error, LimpetError | MemoryError | SystemError):
                    self._wrong.append(f"another caller gets a bare {type(error).__name__}: {error}")
                self._ended.set()
                return
            self._counted = counted


class TasksLife(StoreLife):
    """The life of an AsyncStore, with many tasks at once."""

    _loop: asyncio.AbstractEventLoop | None = None

    def live(self) -> None:
        self._loop = asyncio.new_event_loop()
        try:
            self._loop.run_until_complete(self._main())
        except RuntimeError as error:
            if "Event loop stopped" in str(error):  # what asyncio makes of an allocation of its own that fails
                raise MemoryError from error
            raise
        self._loop.close()

    async def _main(self) -> None:
        front = await AsyncStore.open(self._state_dir)
        self._store = front.store
        await front.add_sandbox(_SANDBOX)
        await self._await({"a": 0}, lambda: front.add(_METADATA["a"], RUNNING))
        await self._await({"a": 1}, lambda: front.update("a", bump))
        await self._await({"a": 2}, lambda: front.checkpoint("a", replace(RUNNING, exit_code=2)))
        await self._await({"a": 3, "b": 0}, lambda: front.transact(_change))
        await self._await({"a": 3}, lambda: front.delete("b"))
        await front.close()

    def leave(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            self._loop.run_until_complete(asyncio.sleep(0.01))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
        super().leave()

    async def _await(self, then: State, call: Callable[[], Any]) -> None:
        self._maybe = then
        await call()
        self._done = then


def _find_bad_backup(path: str) -> Iterator[str]:
    if not os.path.exists(path):
        yield "an acknowledged backup is missing"
        return
    copy = sqlite3.connect(path)
    if copy.execute("PRAGMA integrity_check").fetchone() != ("ok",):
        yield "an acknowledged backup is damaged"
    copy.close()


LIVES: Mapping[str, Callable[[str], Life]] = {"store": StoreLife, "tasks": TasksLife}


@contextmanager
def _close_once() -> Iterator[None]:
    """A store that takes itself for closed as soon as somebody has begun to close it."""

    def close(store: Store) -> None:
        if not store.is_closed:
            real(store)

    real = Store.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "close", close)
        yield


@contextmanager
def _collect_connections() -> Iterator[None]:
    """A writer whose connection is closed, and its WAL removed, when it is collected."""

    def close(connection: sqlite3.Connection) -> None:
        connection.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_connection, "keep_open", lambda _: None)
        patch.setattr(sqlite_connection, "close_writer", close)
        patch.setattr(sqlite_writer, "close_writer", close)
        yield


CONTROLS: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "": nullcontext,
    "close-once": _close_once,
    "collected": _collect_connections,
}
"""Broken stores, which the campaign must catch."""
