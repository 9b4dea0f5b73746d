"""What all benchmarks share: inputs, timing, tolerances and facts of the machine."""
