"""NNX modules: parameters with axis names around the pure functions of `research.ops`."""
