"""Reinforcement learning on toy tasks in pure JAX: environments, soft actor-critic with a mixture of experts, runs over
seeds."""
