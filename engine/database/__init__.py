"""The database under the store: what is asked of it (`contract`, `changes`), and SQLite behind that."""

from limpet.engine.database.changes import Changes
from limpet.engine.database.contract import Database, Journal, Records
from limpet.engine.database.page import EventPage

__all__ = ["Changes", "Database", "EventPage", "Journal", "Records"]
