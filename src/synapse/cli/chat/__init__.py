"""`synapse chat`: one answer for a script, or a conversation at a prompt."""
