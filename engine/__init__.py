"""What a runtime calls: `Engine` runs containers and recovers them, `Store` keeps records for a runtime of its own.

Read `engine` (the whole in one place), `container` (a life, step by step), `store` and `commit` (how a change
becomes durable), `recovery_pass` (what happens after a crash), then `starters` (how a process comes to be).

Names are loaded when they are first used, so that a command line that needs none of them starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limpet.engine.aio import AsyncContainer, AsyncEngine, AsyncSandbox, AsyncStore
    from limpet.engine.engine import Engine
    from limpet.engine.lifecycle.container import Container
    from limpet.engine.lifecycle.sandbox import Sandbox
    from limpet.engine.reconcile import recover
    from limpet.engine.store import Store
    from limpet.schema import errors

_HOMES = {
    "AsyncContainer": "limpet.engine.aio",
    "AsyncEngine": "limpet.engine.aio",
    "AsyncSandbox": "limpet.engine.aio",
    "AsyncStore": "limpet.engine.aio",
    "Container": "limpet.engine.lifecycle.container",
    "Engine": "limpet.engine.engine",
    "Sandbox": "limpet.engine.lifecycle.sandbox",
    "Store": "limpet.engine.store.store",
    "recover": "limpet.engine.reconcile.recovery_pass",
}

__all__ = [
    "AsyncContainer",
    "AsyncEngine",
    "AsyncSandbox",
    "AsyncStore",
    "Container",
    "Engine",
    "Sandbox",
    "Store",
    "errors",
    "recover",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("limpet.schema.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'limpet.engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
