"""Evaluations: their files, scores, paired tests, the comparison, the HTML page, charts."""
