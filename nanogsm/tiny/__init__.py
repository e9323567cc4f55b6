"""The embedded default, a scale model of the study: so far its word problems (problems.py)."""
