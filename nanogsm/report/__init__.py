"""Scores and paired tests, the comparison of two evaluations, the HTML page, charts."""
