"""The terminal: every command of the registry, and the programs `chat`, `demo` and `up`."""
