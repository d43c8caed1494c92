"""What the containers of one engine share, and how their steps keep out of each other's way."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from limpet.engine.images import ImageStore
from limpet.engine.starters import Starter
from limpet.engine.store import Store
from limpet.engine.watcher import Watcher
from limpet.recovery.rules import end
from limpet.schema.errors import NotFoundError


@dataclass(kw_only=True)
class Runtime:
    """The store, the images, the starter and the watcher behind an engine's containers."""

    store: Store
    images: ImageStore
    starter: Starter
    environment: Mapping[str, str]
    containers_dir: str
    reexamine: Callable[[], object]
    watcher: Watcher = field(init=False)
    _ended: threading.Condition = field(default_factory=threading.Condition)
    _steps: WeakValueDictionary[str, threading.RLock] = field(default_factory=WeakValueDictionary)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.watcher = Watcher(self._note_exit, lambda pidfd: self.starter.signal(pidfd, 9))

    def bundle_path(self, container_id: str) -> str:
        """Return where the container's bundle is, or would be."""
        return os.path.join(self.containers_dir, container_id)

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
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._ended:
            while not self.store.status(container_id).finished_at:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._ended.wait(left)
        return True

    def _note_exit(self, container_id: str, exit_code: int | None, finished_at: int) -> None:
        """Write down how a container ended, unless that is known already."""
        with suppress(NotFoundError):
            self.store.update(
                container_id,
                lambda old: old if old.finished_at else end(old, exit_code, finished_at=finished_at),
            )
        with self._ended:
            self._ended.notify_all()
