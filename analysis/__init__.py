"""Scripts that read finished runs: reports, figures, tables."""
