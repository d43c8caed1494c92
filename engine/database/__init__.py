"""The database under the store. Behind this door stands SQLite."""
