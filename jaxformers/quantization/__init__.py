"""Weights of eight and four bits."""
