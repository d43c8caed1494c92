"""Opens a store whose connections have other settings, so that a promise is broken or a rare moment is frequent."""

from limpet.engine.database.sqlite import WRITER_PRAGMAS, Pragmas, open_database
from limpet.engine.state.directory import StateDirectory
from limpet.engine.store import Store
from limpet.schema.metadata import DEFAULT_NODE


def replace_pragmas(**values: tuple[str, object]) -> Pragmas:
    """Return the settings of a writing connection with some replaced: by name what is set, and what is read back."""
    return [(name, *values.get(name, (value, expected))) for name, value, expected in WRITER_PRAGMAS]


def open_store(state_dir: str, pragmas: Pragmas = WRITER_PRAGMAS) -> Store:
    """Open a store as `Store.open` does, with these settings. Raises what that raises."""
    directory = StateDirectory.acquire(state_dir)
    try:
        return Store(directory, open_database(directory, DEFAULT_NODE, pragmas))
    except BaseException:
        directory.release()
        raise
