"""Tokenizers: loading, using, training and saving them, and chat templates."""
