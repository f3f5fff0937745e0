"""LoRA phases and where weights live."""
