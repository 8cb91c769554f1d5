"""Checkpoints and tokenizers of Hugging Face: read, verified and written back."""
