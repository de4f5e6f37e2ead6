"""Pure functions on nested networks: spaces, slicing, which sub-networks a step trains, importance sorting."""
