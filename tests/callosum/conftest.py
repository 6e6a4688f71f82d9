"""The logs that a test asks for by name."""

from callosum.log.log_backends import backend, durable, log

__all__ = ["backend", "durable", "log"]
