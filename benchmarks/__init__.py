"""What the READMEs' figures are measured with: python -m benchmarks.NAME."""
