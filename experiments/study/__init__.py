"""A study: its checked arguments, and measuring its cells."""
