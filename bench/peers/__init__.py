"""Compare other packages with this one: the same jobs on the same inputs, with checked results."""
