"""The implementations of the operations, one folder for each backend."""
