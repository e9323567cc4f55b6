"""What surrounds a training loop: the run folder, flags and recipes, the plan, health, the
console."""
