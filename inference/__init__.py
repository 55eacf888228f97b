"""Scripts that run inference: train, predict, prune, compare, time."""
