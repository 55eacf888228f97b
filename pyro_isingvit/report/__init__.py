"""A run made visible: figures, and pages that need nothing else."""
