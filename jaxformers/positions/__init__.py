"""Position schemes: how the position of a token in its sequence enters the computation."""
