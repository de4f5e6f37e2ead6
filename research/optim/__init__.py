"""Optax chains from a config: schedules over steps, and rules over the names of parameters and axes."""
