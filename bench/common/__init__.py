"""Shared by all benchmarks: inputs, timing, tolerances, machine facts, long-double oracle."""
