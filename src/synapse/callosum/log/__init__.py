"""Durable logs: what every backend does, and the backends."""
