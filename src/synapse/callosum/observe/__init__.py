"""What counts the messages that pass."""
