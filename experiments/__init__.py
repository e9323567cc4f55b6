"""Studies made with the three scripts: the original study, PPO settings one at a time, curves."""
