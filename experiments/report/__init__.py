"""The report of a run: one HTML page with its findings and figures."""
