"""Measurements beside other tools, and of this one: python -m benchmarks.NAME --help."""
