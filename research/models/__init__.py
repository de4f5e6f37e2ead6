"""Whole networks, one family a file, and the registry."""
