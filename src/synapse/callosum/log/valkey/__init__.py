"""The log in Valkey or Redis Streams."""
