"""Training methods, one a file; each registers itself, see `research.train.method`."""
