"""Files of all formats: how they are found, read, and written so that none is half there."""
