"""The fleet's history: one alembic revision for each change of its tables, run by the first node that needs it."""
