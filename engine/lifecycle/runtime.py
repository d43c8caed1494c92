"""What the containers of one engine share, and how their steps keep out of each other's way."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from weakref import WeakValueDictionary

from limpet.engine.images import ImageStore
from limpet.engine.lifecycle.watcher import Watcher
from limpet.engine.starters import Starter
from limpet.engine.store import Store
from limpet.schema.errors import NotFoundError
from limpet.schema.status import end


@dataclass(kw_only=True)
class Runtime:
    """The store, the images, the starter and the watcher behind an engine's containers."""

    store: Store
    images: ImageStore
    starter: Starter
    containers_dir: str
    sandboxes_dir: str
    reexamine: Callable[[str], object]
    """Looks at one container again, and writes down what is true of it."""
    watcher: Watcher = field(init=False)
    _bells: list[SimpleQueue[None]] = field(default_factory=list)
    """One for each waiting caller. Not a Condition: a signal handler that raises can leave that locked."""
    _steps: WeakValueDictionary[str, threading.RLock] = field(default_factory=WeakValueDictionary)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.watcher = Watcher(self._note_exit, self.starter)

    def bundle_path(self, container_id: str) -> str:
        """Return where the container's bundle is, or would be."""
        return os.path.join(self.containers_dir, container_id)

    def sandbox_path(self, sandbox_id: str) -> str:
        """Return where the sandbox's directory is, or would be.

        Not where its record says: in a copy of a state directory that would be the original's.
        """
        return os.path.join(self.sandboxes_dir, sandbox_id)

    @contextmanager
    def exclusive(self, container_id: str) -> Iterator[None]:
        """Keep other steps of the same container (or sandbox) out while the block runs."""
        with self._guard:
            lock = self._steps.get(container_id)
            if lock is None:
                lock = self._steps[container_id] = threading.RLock()
        with lock:
            yield

    def wait_until_ended(self, container_id: str, timeout: float | None) -> bool:
        """Wait until the container has ended, for `timeout` seconds at most; say whether it has."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        bell: SimpleQueue[None] = SimpleQueue()
        self._bells.append(bell)
        try:
            while not self.store.status(container_id).finished_at:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                with suppress(Empty):
                    bell.get(timeout=min(left, threading.TIMEOUT_MAX))
        finally:
            self._bells.remove(bell)
        return True

    def _note_exit(self, container_id: str, exit_code: int | None, finished_at: int) -> None:
        """Write down how a container ended, unless that is known already."""
        with suppress(NotFoundError):
            self.store.update(
                container_id,
                lambda old: old if old.finished_at else end(old, exit_code, finished_at=finished_at),
            )
        for bell in list(self._bells):
            bell.put(None)
