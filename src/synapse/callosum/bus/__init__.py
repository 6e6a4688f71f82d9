"""The bus: subscriptions, groups and requests within a process."""
