"""How a message gets from a queue or a log to its handler, and what becomes of it."""
