"""Train, keep, load and query a run."""
