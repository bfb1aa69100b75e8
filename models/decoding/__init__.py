"""Sampling: the decode step, its cache and CUDA graphs, drawing tokens."""
