"""Measurements: every figure that the project states comes from a command that runs these."""
