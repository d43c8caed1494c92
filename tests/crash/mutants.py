"""Stores that are broken on purpose, one promise each: what the crash tests must find."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from limpet.engine.drill.store_life import StoreLife


class Broken(StoreLife):
    """The store's life with one thing replaced while it lives; its check is the real one."""

    def __init__(self, *replaced: tuple[str, object], checkpoints: int = 3) -> None:
        super().__init__(checkpoints)
        self._replaced = replaced

    @contextmanager
    def _break(self) -> Iterator[None]:
        patches = [mock.patch(target, new) for target, new in self._replaced]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()

    def live(self, directory: str, acknowledge: Callable[[bytes], None]) -> None:
        with self._break():
            super().live(directory, acknowledge)


def _pragmas(**changed: tuple[str, object]) -> tuple[str, object]:
    from limpet.engine.database import sqlite

    return (
        "limpet.engine.database.sqlite.WRITER_PRAGMAS",
        tuple((name, *changed.get(name, (value, back))) for name, value, back in sqlite.WRITER_PRAGMAS),
    )


MUTANTS = {
    "synchronous off": lambda: Broken(_pragmas(synchronous=("off", 0))),
    "synchronous normal": lambda: Broken(_pragmas(synchronous=("normal", 1))),
    "no flush of directories": lambda: Broken(
        ("limpet.engine.durable.sync_directory", lambda path: None),
        ("limpet.engine.database.migrate.sync_directory", lambda path: None),
        ("limpet.engine.store.sync_directory", lambda path: None),
        ("limpet.engine.durable._sync_name", lambda path: None),
    ),
}
