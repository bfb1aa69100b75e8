"""Weights and processes: ranks, sharding, the optimizer, loading what the flags ask for."""
