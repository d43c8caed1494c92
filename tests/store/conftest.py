"""A store on each database that is behind the contract."""

from collections import defaultdict
from collections.abc import Iterator

import pytest

from limpet import Store
from limpet.engine.database.memory import MemoryDatabase, Tables
from tests.records import sandbox


@pytest.fixture(params=["sqlite", "memory"])
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each state directory have a database of this kind."""
    if request.param == "memory":
        tables: defaultdict[str, Tables] = defaultdict(Tables)
        monkeypatch.setattr(
            "limpet.engine.store.store.open_database",
            lambda directory, node: MemoryDatabase(tables[directory.path], node),
        )


@pytest.fixture
def store(database: None, state_dir: str) -> Iterator[Store]:
    """A store with the sandbox "s"."""
    with Store.open(state_dir) as opened:
        opened.add_sandbox(sandbox())
        yield opened
