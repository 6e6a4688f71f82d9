"""What an engine keeps between steps: keys and values, and LoRA layers."""
