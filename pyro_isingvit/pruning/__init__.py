"""A run made smaller."""
