"""Runs of studies: their folders, their units, and who measures them."""
