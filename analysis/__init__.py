"""Scripts that read a finished run: report."""
