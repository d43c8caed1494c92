"""What a trial changes in a node's process: its pauses, for speed; how often it sends; and, for controls, its promises.

Each is called in a process of its own, which ends with it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final, NamedTuple

_LOCK_SECONDS: Final = 0.2


def _fleet(name: str) -> Any:
    return import_module(f"limpet.engine.fleet.{name}")  # the fleet's own rooms, behind its door


def _store(name: str) -> Any:
    return import_module(f"limpet.engine.store.{name}")


def hasten() -> None:
    """Shorten all pauses. Whoever vanished amid a transaction is given up soon, too.

    Each change is committed by the committer thread, as it is where many callers are: then the fleet wakes its caller.
    """
    _change(_store("commit").Committer, _is_idle=lambda _: False)
    _change(_fleet("shipper"), _FIRST_PAUSE=0.002, _LONGEST_PAUSE=0.05, _LINGER_SECONDS=0.0, _REST=0)
    _change(_fleet("address"), _IDLE_SECONDS=0.2)
    _change(_fleet("batch"), _LOCK_SECONDS=_LOCK_SECONDS)


def _change(owner: Any, **values: object) -> None:
    """Set what a module or class has. Raises AttributeError for a name that was moved: nobody would heed it."""
    for name, value in values.items():
        getattr(owner, name)
        setattr(owner, name, value)


@contextmanager
def hastened() -> Iterator[None]:
    """Take over from a node at once in this process, too, while the block runs."""
    batch = vars(_fleet("batch"))
    before = batch["_LOCK_SECONDS"]
    batch["_LOCK_SECONDS"] = _LOCK_SECONDS
    try:
        yield
    finally:
        batch["_LOCK_SECONDS"] = before


def send_late() -> None:
    """Send each batch twice, and the one before it once more after it: that must change nothing."""
    hasten()
    batch = _fleet("batch")
    write = batch.write_batch
    before: list[Any] = []

    def write_late(connection: Any, held: Any, extract: Any, **settings: Any) -> bool:
        is_written: bool = write(connection, held, extract, **settings)
        for late in (extract, *before) if is_written else ():
            write(connection, held, late)
        before[:] = [extract]
        return is_written

    batch.write_batch = write_late


def acknowledge_early() -> None:
    """Control: a call in sync mode returns before the fleet has its change."""
    hasten()
    _fleet("shipper").Shipper.wait = lambda *_: None
    _store("fleet").FleetLink.expect = lambda *_: None


def ignore_epochs() -> None:
    """Control: whoever was taken over from is not refused."""
    hasten()
    batch = vars(_fleet("batch"))
    batch["_BEGIN"] = batch["_BEGIN"].replace("epoch = %(epoch)s", "%(epoch)s > 0")
    batch["_BEAT"] = batch["_BEAT"].replace("epoch = %s", "%s > 0")


def ignore_order() -> None:
    """Control: a row is written over whatever is there, however new."""
    send_late()
    rows = _fleet("rows")
    rows.UPSERT = {table: text.partition(" WHERE (excluded")[0] for table, text in rows.UPSERT.items()}


def wait_for_no_disk() -> None:
    """Control: a commit returns before PostgreSQL has it on disk."""
    _commit_with("off")


def wait_for_no_standby() -> None:
    """Control: a commit returns before a standby has it."""
    _commit_with("local")


def _commit_with(level: str) -> None:
    hasten()
    address = vars(_fleet("address"))
    address["_SETTINGS"] = address["_SETTINGS"].replace("ELSE 'on' END", f"ELSE '{level}' END")


class Control(NamedTuple):
    """A promise that is broken, in words; how; and at which kinds of points it shows."""

    broken: str
    prepare: Callable[[], object]
    actions: tuple[str, ...]


CONTROLS: Final = (
    Control("a node that acknowledges before the fleet has it", acknowledge_early, ("cut", "kill")),
    Control("a node that goes on after it was taken over from", ignore_epochs, ("hold",)),
    Control("rows that are written over newer ones", ignore_order, ("late",)),
)
CONTROLS_OF_SERVERS: Final = (
    Control("a node whose commits wait for no disk", wait_for_no_disk, ("crash",)),
    Control("a node whose commits wait for no standby", wait_for_no_standby, ("promote",)),
)
"""They show where PostgreSQL itself is lost."""
