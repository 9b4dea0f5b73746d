"""Runs of studies: their folders, their units, and the executors that measure them."""
