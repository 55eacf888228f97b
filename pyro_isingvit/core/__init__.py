"""What every room stands on: settings, errors, processes, checkpoints, guards against hostile files."""
