"""Scripts that run inference: train, predict."""
