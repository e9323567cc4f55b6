"""The embedded default, a scale model of the original study: problems.py generates its data, and
gemma/ is its model, made by experiments/pretrain_tiny.py."""
