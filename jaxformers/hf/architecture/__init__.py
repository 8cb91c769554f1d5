"""A model's architecture as a record, between the config.json of a family and our constructors.

Each concept has a file. The file has the concept's part of the record, builds its modules, reads
the record back from modules, and handles the settings of config.json that are about it alone.
"""
