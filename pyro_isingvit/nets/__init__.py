"""The transformer, and what can be read off it."""
