"""A server with the OpenAI interface, over one decoding engine."""
