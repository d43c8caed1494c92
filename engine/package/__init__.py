"""limpet keeps the state of containers on disk, so that a runtime that crashes comes back knowing what is true.

`Engine` runs containers and recovers them; `Store` keeps the records of a runtime that has processes of its own.
Each name is loaded when it is first used, so that a program pays only for what it calls.
"""

from importlib import import_module

TYPE_CHECKING = False  # type checkers take it for true; importing typing would cost more than all of this module
if TYPE_CHECKING:
    from limpet.engine.aio import AsyncEngine as AsyncEngine
    from limpet.engine.aio import AsyncStore as AsyncStore
    from limpet.engine.engine import Engine as Engine
    from limpet.engine.inspection import Snapshot as Snapshot
    from limpet.engine.reconcile import recover as recover
    from limpet.engine.starters.oci import OciStarter as OciStarter
    from limpet.engine.store import Store as Store
    from limpet.schema import errors as errors

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "limpet.engine.aio",
    "AsyncStore": "limpet.engine.aio",
    "Engine": "limpet.engine.engine",
    "OciStarter": "limpet.engine.starters.oci",
    "Snapshot": "limpet.engine.inspection",
    "Store": "limpet.engine.store",
    "recover": "limpet.engine.reconcile",
}

__all__ = ["AsyncEngine", "AsyncStore", "Engine", "OciStarter", "Snapshot", "Store", "__version__", "errors", "recover"]


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("limpet.schema.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'limpet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
