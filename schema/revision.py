"""The revision of the schema, apart from the tables: reading it must not load SQLAlchemy."""

SCHEMA_REVISION = "0008"
"""The newest migration: what this version of limpet reads and writes."""
