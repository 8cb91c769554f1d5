"""Files of all formats: finding them, reading them, and writing them completely or not at all."""
