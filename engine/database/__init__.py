"""The database under the store: opening it, migrating it, writing batches to it, reading and copying it."""
