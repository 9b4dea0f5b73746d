"""Statistics of a run's table: correlations, intervals, tests and controls."""
