"""For asyncio: the engine and the store, with the same promises and errors, and without a thread for each task.

Read `answers` (what a cancelled task leaves), `workers` (which threads there are), `store`, then `engine`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limpet.engine.aio.container import AsyncContainer
    from limpet.engine.aio.engine import AsyncEngine
    from limpet.engine.aio.fleet import AsyncFleet
    from limpet.engine.aio.sandbox import AsyncSandbox
    from limpet.engine.aio.store import AsyncStore

_HOMES = {
    "AsyncContainer": "limpet.engine.aio.container",
    "AsyncEngine": "limpet.engine.aio.engine",
    "AsyncFleet": "limpet.engine.aio.fleet",
    "AsyncSandbox": "limpet.engine.aio.sandbox",
    "AsyncStore": "limpet.engine.aio.store",
}

__all__ = ["AsyncContainer", "AsyncEngine", "AsyncFleet", "AsyncSandbox", "AsyncStore"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'limpet.engine.aio' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
