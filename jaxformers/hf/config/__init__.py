"""How the entries of a config.json are read and written, whatever they are about."""
