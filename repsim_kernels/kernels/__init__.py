"""Implementations of the operations, one directory per backend."""
