"""A model's architecture as a record, between the config.json of a family and our constructors.

Each concept has a file: its part of the record, how it is built, how it is read back from modules,
and the settings of config.json that are about it alone.
"""
