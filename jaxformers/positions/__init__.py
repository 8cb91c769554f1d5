"""Position schemes: what the place of a token in its sequence does to the computation."""
