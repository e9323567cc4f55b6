"""The embedded default: a scale model of the study. problems.py writes its data; gemma/ is its model,
made by pretrain.py."""
