"""The database's history: one alembic revision for each change of its tables, run when a store is opened."""
