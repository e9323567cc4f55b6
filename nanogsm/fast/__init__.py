"""Faster forms of what the heart computes. Each gives the same results as its plain form, up to
rounding, and a test checks it."""
