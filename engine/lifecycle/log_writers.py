"""Which container writes which log: of two that ran with the same one, lines would be lost or told as the other's.

One engine alone starts containers in a state directory, so what it has in memory is all there is to know.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from limpet.engine.store import Store
from limpet.schema.errors import InvalidStateError, NotFoundError, StoreDamagedError, quote_path
from limpet.schema.metadata import Metadata
from limpet.schema.status import ContainerState

_MOST_ENDED = 1000
"""How many containers that have ended are remembered before they are looked for."""


class LogWriters:
    """Keeps the logs of containers that run apart. Thread-safe."""

    def __init__(self, store: Store, bring_home: Callable[[Metadata], Metadata]) -> None:
        """`bring_home` returns metadata with the paths of now."""
        self._store, self._bring_home = store, bring_home
        self._guard = threading.RLock()
        self._writers: dict[str, str] = {}
        """By log: the last that was started with it."""
        self._starting: set[str] = set()
        self._is_loaded = False
        self._most = _MOST_ENDED

    @contextmanager
    def claimed(self, container_id: str, path: str) -> Iterator[None]:
        """Have one that is started in the block be alone with its log. Raises InvalidStateError if another has it."""
        if not path:
            yield
            return
        with self._guard:
            self._prepare()
            other = self._writers.get(path, container_id)
            if other != container_id and self._may_write(other):
                raise InvalidStateError(
                    f"cannot start container {container_id}: its log {quote_path(path)} is that of container {other},"
                    " which runs; stop that one, or create another with a log_path of its own"
                )
            self._writers[path] = container_id
            self._starting.add(container_id)
        try:
            yield
        finally:
            with self._guard:
                self._starting.discard(container_id)  # its status tells from now on

    def _prepare(self) -> None:
        """Find those that run since before this engine, once; and forget those that have ended, now and then."""
        if not self._is_loaded:
            for state in (ContainerState.RUNNING, ContainerState.UNKNOWN):
                for record in self._store.list(state=state):
                    # Of a damaged record, or a copy's log that is the original's, nobody knows what it writes here.
                    with suppress(StoreDamagedError, NotFoundError, InvalidStateError):
                        self._writers[self._bring_home(record.metadata).log_path] = record.id
            self._is_loaded = True
        if len(self._writers) > self._most:
            self._writers = {path: key for path, key in self._writers.items() if self._may_write(key)}
            self._most = _MOST_ENDED + 2 * len(self._writers)

    def _may_write(self, container_id: str) -> bool:
        if container_id in self._starting:
            return True
        try:
            status = self._store.status(container_id)
        except (NotFoundError, StoreDamagedError):
            return False
        return bool(status.started_at) and not status.finished_at
