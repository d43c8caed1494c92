"""What alembic runs. The connection comes from `upgrade`, with its transaction already begun."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table="fleet_version",
    # One transaction around all revisions leaves no state in between.
    transactional_ddl=True,
    transaction_per_migration=False,
)
context.run_migrations()
