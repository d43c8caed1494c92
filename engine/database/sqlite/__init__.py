"""SQLite: opening it safely, migrating it, writing batches to it, reading and copying it."""
