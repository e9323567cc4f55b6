"""The embedded default: a scale model of the whole study that needs no download and no GPU."""
