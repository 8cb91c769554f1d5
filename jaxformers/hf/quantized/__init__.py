"""Checkpoints whose weights were quantized before: a file per format.

Each format is a class that is made of the entry `quantization_config` of config.json, and that
knows which tensors of a module hold its weight. `checkpoint` shows the loader one tensor
`X.weight` `(out, in)` in their place.
"""
