"""Lists of few containers among many, by each filter, beside a bare SELECT that has an index for it."""

import sqlite3
import statistics
import time
from collections.abc import Callable, Sequence

from limpet.benchmarks.contenders import ENDED, RUNNING, container_id
from limpet.benchmarks.figures import Cell, Figures
from limpet.engine.state.names import DATABASE
from limpet.engine.store import Record, Store
from limpet.schema.cri import parse_container_config, parse_pod_sandbox_config
from limpet.schema.errors import StoreError
from limpet.schema.image import ImageManifest, ImageName
from limpet.schema.metadata import Metadata, SandboxMetadata
from limpet.schema.rows import StatusRow

_IN_SANDBOX = 100
_MAX_RUNNING = 1000
_ROWS_AT_ONCE = 5000
_PREFIX = 3
_COLUMNS = ", ".join(StatusRow._fields)
_OURS = ", ".join(f"container_status.{name}" for name in StatusRow._fields)
_MAKE_BARE = (
    "ATTACH ? AS limpet",
    f"""CREATE TABLE bare AS
    SELECT {_OURS}, name, sandbox_id, started_at <> 0 AND finished_at = 0 AS runs
    FROM limpet.container JOIN limpet.container_status USING (node, id)""",  # noqa: S608  # our own names
    "CREATE UNIQUE INDEX by_id ON bare (id)",
    "CREATE INDEX by_name ON bare (name)",
    "CREATE INDEX by_sandbox ON bare (sandbox_id)",
    "CREATE INDEX by_state ON bare (runs)",
    "CREATE TABLE bare_label (key TEXT, value TEXT, id TEXT, PRIMARY KEY (key, value, id)) WITHOUT ROWID",
    "INSERT INTO bare_label SELECT each.key, each.value, container.id FROM limpet.container, json_each(labels) AS each",
)
_BARE = {
    "name": "name = ?",
    "sandbox": "sandbox_id = ?",
    "prefix": "id >= ? AND id < ?",
    "state": "runs = ?",
    "label": "id IN (SELECT id FROM bare_label WHERE key = 'shard' AND value = ?)",
}
FILTERS = tuple(_BARE)


def make_lists(path: str, size: int) -> None:
    """Make a store of `size` containers, 100 in each sandbox and with each label, and the SELECT's own database."""
    running = _running(size)
    with Store.open(path) as store:
        for number in range(-(-size // _IN_SANDBOX)):
            name = _sandbox(number * _IN_SANDBOX)
            config = parse_pod_sandbox_config({"metadata": {"name": name, "uid": "0", "namespace": "bench"}})
            store.add_sandbox(SandboxMetadata(id=name, name=name, config=config, created_at=1))
        for start in range(0, size, _ROWS_AT_ONCE):
            with store.transaction() as draft:
                for number in range(start, min(start + _ROWS_AT_ONCE, size)):
                    draft.add(_make_metadata(number), RUNNING if number < running else ENDED)
    connection = sqlite3.connect(f"{path}.db")
    for statement in _MAKE_BARE:
        connection.execute(statement, (f"{path}/{DATABASE}",) if "?" in statement else ())
    connection.commit()
    connection.close()


def measure_lists(cell: Cell) -> Figures:
    """Ask for each list again and again, each for the same time; the first time fills the caches."""
    path = f"{cell.stage}/lists-{cell.size}"
    if cell.contender == "limpet":
        with Store.open(path) as store:
            with store.transaction() as draft:  # until it is told that they run, they are Unknown
                for number in range(_running(cell.size)):
                    draft.replace(container_id(number), RUNNING)
            return _measure(cell, lambda key: [record.id for record in _LISTS[key](store, cell.size // 2)])
    connection = sqlite3.connect(f"file:{path}.db?mode=ro", uri=True)
    try:
        return _measure(cell, lambda key: [str(row[0]) for row in _select(connection, key, cell.size // 2)])
    finally:
        connection.close()


def _measure(cell: Cell, ask: Callable[[str], Sequence[str]]) -> Figures:
    figures = {}
    for key in FILTERS:
        found = len(ask(key))
        wanted = _expected(key, cell.size)
        if wanted and found != wanted:
            raise StoreError(f"a list by {key} has {found} containers, not {wanted}")
        figures[f"{key}_us"] = _repeat(lambda key=key: ask(key), cell.seconds / len(FILTERS)) * 1e6  # type: ignore[misc]
    return figures


def _repeat(call: Callable[[], object], seconds: float) -> float:
    """Return the median of how long a call takes, in seconds."""
    times: list[float] = []
    ending = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < ending:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _expected(key: str, size: int) -> int:
    """Return how many containers a list has, 0 for the one that depends on the ids."""
    return {"name": 1, "state": _running(size), "prefix": 0}.get(key, min(_IN_SANDBOX, size))


def _select(connection: sqlite3.Connection, key: str, number: int) -> Sequence[tuple[object, ...]]:
    prefix = container_id(number)[:_PREFIX]
    parameters: dict[str, tuple[object, ...]] = {
        "name": (_name(number),),
        "sandbox": (_sandbox(number),),
        "prefix": (prefix, prefix + "g"),
        "state": (1,),
        "label": (_shard(number),),
    }
    return connection.execute(f"SELECT {_COLUMNS} FROM bare WHERE {_BARE[key]}", parameters[key]).fetchall()  # noqa: S608  # our own names


_LISTS: dict[str, Callable[[Store, int], Sequence[Record]]] = {
    "name": lambda store, number: store.list(name=_name(number)),
    "sandbox": lambda store, number: store.list(sandbox_id=_sandbox(number)),
    "prefix": lambda store, number: store.list(id=container_id(number)[:_PREFIX]),
    "state": lambda store, _: store.list(state="running"),
    "label": lambda store, number: store.list(labels={"shard": _shard(number)}),
}


def _running(size: int) -> int:
    return min(_MAX_RUNNING, size // 10)


def _name(number: int) -> str:
    return f"container-{number}"


def _sandbox(number: int) -> str:
    return f"sandbox-{number // _IN_SANDBOX:08}"


def _shard(number: int) -> str:
    return str(number // _IN_SANDBOX)


def _make_metadata(number: int) -> Metadata:
    labels = {"app": "x", "shard": _shard(number)}
    config = parse_container_config(
        {"metadata": {"name": _name(number)}, "image": {"image": "host"}, "command": ["true"], "labels": labels}
    )
    return Metadata(
        id=container_id(number),
        name=_name(number),
        sandbox_id=_sandbox(number),
        config=config,
        image_manifest=ImageManifest(name=ImageName("host")),
    )
