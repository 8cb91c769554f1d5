"""Tokenizers: reading, using, training and saving them, and chat templates."""
