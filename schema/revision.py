"""The version of the schema, apart from the tables: who only reads need not load SQLAlchemy."""

SCHEMA_REVISION = "0002"
"""The newest migration: what this version of limpet reads and writes."""
