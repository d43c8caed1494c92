"""The store's life for very many images: most are read as `limpet ps` reads, which is quicker than to recover each.

One of 32, and each that a reader refuses, is opened and recovered as in the drill.
"""

from collections.abc import Sequence
from contextlib import closing

from limpet.engine.database.sqlite.source import Source
from limpet.engine.database.sqlite.wal import examine_wal
from limpet.engine.drill.controls import UnflushedLife
from limpet.engine.drill.sameness import same_moment
from limpet.engine.drill.store_life import Model, StoreLife, _kind
from limpet.engine.state.names import DATABASE
from limpet.schema.codec import find_unsound, row_to_status
from limpet.schema.errors import LimpetError
from limpet.schema.metadata import DEFAULT_NODE
from limpet.testing import Violation

RECOVERED_EVERY = 32


class ReadLife(StoreLife):
    """Its check reads what a crash left, and compares it with the model."""

    def __init__(self, checkpoints: int, *, seed: int = 0) -> None:
        super().__init__(checkpoints, seed=seed)
        self._count = 0

    def check(self, directory: str, acknowledged: Sequence[bytes]) -> None:
        """Compare what can be read. Raises Violation."""
        self._count += 1
        found = None if self._count % RECOVERED_EVERY == 0 else _read(f"{directory}/state/{DATABASE}")
        if found is None:
            super().check(directory, acknowledged)
            return
        done = int(acknowledged[-1]) + 1 if acknowledged else 0
        possible = self._models[done : done + 2]
        if found not in possible:
            raise Violation(_kind(found, possible), f"after step {done} a reader finds {found}, not {possible}")
        with same_moment():
            self._check_backups(directory, done)


class UnflushedReadLife(UnflushedLife, ReadLife):
    """The control: the same check of a store that does not flush its commits."""


def _read(path: str) -> Model | None:
    """Return what a reader finds, None if it refuses: an opening must say whether anything is lost then."""
    try:
        with same_moment():
            examine_wal(f"{path}-wal")
        with closing(Source(path, DEFAULT_NODE)) as source:
            source.ask(lambda reader: reader.require_current())
            _, _, names, rows, _ = source.ask(lambda reader: reader.load_instant())
    except LimpetError:
        return None
    if find_unsound(DEFAULT_NODE, rows) or {row[0] for row in names} != {row[0] for row in rows}:
        raise Violation("torn", f"damaged or incomplete: {names} and {rows}")
    return {row[0]: row_to_status(row).pid for row in rows}
