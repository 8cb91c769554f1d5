"""GGUF files as checkpoints of Hugging Face: their metadata as a config.json, and their tensors."""
