"""Random-access sources, the deterministic order of examples, augmentation. NumPy and grain only."""
