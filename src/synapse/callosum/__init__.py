"""Messages between the parts of Synapse: what a person waits for goes first, and nothing accepted is lost."""
