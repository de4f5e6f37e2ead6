"""State, step, loop, checkpoints, sharding, metrics, evaluation, recalibration and extraction."""
