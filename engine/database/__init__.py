"""The database under the store: what is asked of it (`contract`, `changes`), and SQLite behind that."""

from limpet.engine.database.changes import Changes
from limpet.engine.database.contract import Database, Journal, Records

__all__ = ["Changes", "Database", "Journal", "Records"]
