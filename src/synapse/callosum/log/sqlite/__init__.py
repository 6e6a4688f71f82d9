"""The embedded log, in an SQLite file."""
