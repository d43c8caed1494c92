"""What alembic runs. The connection comes from the opening, with its transaction already begun."""

from alembic import context

from limpet.schema.tables import TABLES

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=TABLES,
    render_as_batch=True,
    # SQLite's DDL is transactional, and one transaction around all revisions leaves no state in between.
    transactional_ddl=True,
    transaction_per_migration=False,
)
context.run_migrations()
