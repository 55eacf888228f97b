"""What draws say: pure functions of probabilities."""
