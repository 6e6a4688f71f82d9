"""LoRA layers as files: PEFT's folders, read and checked."""
