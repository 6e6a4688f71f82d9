"""Model files: where they come from, reading them, their tokenizers and their chat templates."""
