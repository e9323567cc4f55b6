"""Faster forms of what the heart computes. Each gives the same results as its plain form: a test
says so."""
