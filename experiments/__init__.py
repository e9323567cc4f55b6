"""Studies made with the scripts, a search for settings, labels for reward models, and how the
embedded model was made."""
