"""The public operations, one file for each family."""
